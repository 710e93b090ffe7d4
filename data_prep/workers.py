"""Processes for what one interpreter would do alone: large sets are cleaned and tokenised on all cores.

    result = apart(clean, spec, raw, out)      # in a process of its own, when a core is free
    with over_cores() as mapped:
        results = mapped(function, items)      # in processes, one a core, if there is enough to do

A small set stays in this process, since a fresh interpreter costs seconds. The files that are written are the same
either way. A process ends with the one that started it, whatever ends that.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.pool import Pool
from typing import Any, TypeVar

from data_prep.spread import Mapper

Result = TypeVar("Result")

ROWS_WORTH_A_PROCESS = 20_000
CALLS_BEFORE_PROCESSES = 20
_PR_SET_PDEATHSIG = 1


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


_free_cores = threading.BoundedSemaphore(cores())
_running: set[SpawnProcess] = set()
_stopping = threading.Event()


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` in a process of its own, started when a core is free. What it raises is raised here.

    In a worker of a cluster, which may have no processes of its own, it is a plain call.  RuntimeError where the
    process is killed, as for lack of memory or by `stopped_together`.
    """
    if current_process().daemon:
        return function(*arguments)
    context = get_context("spawn")
    with _free_cores:
        if _stopping.is_set():
            raise RuntimeError(f"{function.__name__} was not begun: the run is being stopped")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(sender, os.getpid(), function, arguments), daemon=True)
        process.start()
        _running.add(process)
        sender.close()
        try:
            value, error = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"the process of {function.__name__} was ended with code {process.exitcode}; if nobody stopped it, the "
                "machine ran out of memory: lower max_rows of the data's sources"
            ) from None
        finally:
            process.join()
            _running.discard(process)
    if error is not None:
        raise error
    return value


def pause(seconds: float) -> None:
    """Waits in a thread. Raises RuntimeError where `stopped_together` ends the run meanwhile."""
    if _stopping.wait(seconds):
        raise RuntimeError("not tried again: the run is being stopped")


@contextmanager
def stopped_together() -> Iterator[None]:
    """Ends the processes of `apart` and the pauses when the block ends by an exception, so that no thread goes on
    waiting for them."""
    _stopping.clear()
    try:
        yield
    except BaseException:
        _stopping.set()
        for process in tuple(_running):
            process.kill()
        raise


@contextmanager
def over_cores() -> Iterator[Mapper]:
    """A `map` whose calls are made in processes, one a core; the first few here, as they may be all there are."""

    def mapped(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        waiting = iter(items)
        if not pools:
            yield from map(function, islice(waiting, CALLS_BEFORE_PROCESSES))
        following = next(waiting, None)
        if following is None or current_process().daemon:
            yield from map(function, chain([following] if following is not None else [], waiting))
            return
        if not pools:
            pools.append(get_context("spawn").Pool(cores(), _end_with, (os.getpid(),)))
        yield from pools[0].imap(function, chain([following], waiting))

    pools: list[Pool] = []
    try:
        yield mapped
    finally:
        for pool in pools:
            pool.terminate()
            pool.join()


def _call(sender: Connection, parent: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _end_with(parent)
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, error))


def _end_with(parent: int) -> None:
    """In the new process: dies with the parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
