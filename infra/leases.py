"""GPU leases: which run has which GPU of this machine, so that two runs never share one.

A lease is an flock on `<folder>/<GPU>.lock`. The flow takes it, and the supervisor of the processes that use the GPU
holds it as well: the system gives it back when the last of them has ended, however it ended. So there is no server, no
time-out, and nothing to tidy up after a kill -9.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from infra.machine import gpu_uuids

FOLDER = "RLHF_GPU_LEASES"  # environment variable: another folder than the one that all users of this machine share
SHARED = "/tmp/rlhf-gpu-leases"  # not TMPDIR: two users would each have their own
SECONDS_BETWEEN_TRIES = 0.5


@dataclass(frozen=True)
class Lease:
    """GPUs that are this process's alone, as CUDA_VISIBLE_DEVICES names them."""

    gpus: tuple[str, ...]
    descriptors: tuple[int, ...]
    """Open files that hold the lease in every process that inherits them."""


@contextmanager
def leased(
    allowed: Sequence[str], count: int, *, holder: str, on_wait: Callable[[str], None] = print
) -> Iterator[Lease]:
    """Holds `count` of the `allowed` GPUs during the block; waits until so many are free.

    All or none: a run that waits holds nothing, so two that want two GPUs each cannot wait for each other for ever.

    Args:
        holder: who this is, for those that wait.
        on_wait: called with a sentence when the wait begins, and whenever other runs stand in the way.
    """
    assert count <= len(allowed)
    paths = _paths(allowed) if count else {}
    told: dict[str, str] = {}
    while (lease := _try(paths, count, holder)) is None:
        taken = _holders(paths)
        if taken and taken != told:
            on_wait(_sentence(count, taken))
            told = taken
        time.sleep(SECONDS_BETWEEN_TRIES)
    try:
        yield lease
    finally:
        for descriptor in lease.descriptors:
            _give_back(descriptor)


def holders(gpus: Sequence[str]) -> dict[str, str]:
    """GPU -> who holds it, of those GPUs that are taken."""
    return _holders(_paths(gpus))


def _holders(paths: Mapping[str, Path]) -> dict[str, str]:
    taken = {}
    for gpu, path in paths.items():
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                taken[gpu] = os.read(descriptor, 500).decode(errors="replace") or "another run"
            finally:
                os.close(descriptor)
    return taken


def _try(paths: Mapping[str, Path], count: int, holder: str) -> Lease | None:
    """The lease of the first `count` free GPUs; None, with nothing held, if there are fewer."""
    held: dict[str, int] = {}
    for gpu, path in paths.items():
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        held[gpu] = descriptor
        if len(held) == count:
            break
    if len(held) < count:
        for descriptor in held.values():
            _give_back(descriptor)
        return None
    for descriptor in held.values():
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())
    return Lease(tuple(held), tuple(held.values()))


def _give_back(descriptor: int) -> None:
    # Unlocked as well as closed: a process that this one forked has the open file too, and may live on.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _open(path: Path) -> int:
    """The lock file, open for writing; made if need be, for every user to open."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        # First without O_CREAT: in a folder that all may write to, Linux refuses it on a file of another user.
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL)
            os.fchmod(descriptor, 0o666)
            return descriptor


def _paths(gpus: Sequence[str]) -> Mapping[str, Path]:
    """GPU -> its lock file, by UUID where the driver tells: an index means another GPU in another container."""
    uuids = gpu_uuids()
    folder = Path(os.environ.get(FOLDER, SHARED))
    if not folder.is_dir():
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            folder.chmod(0o1777)
    return {gpu: folder / f"{uuids[int(gpu)] if _is_index(gpu, uuids) else gpu}.lock" for gpu in gpus}


def _is_index(gpu: str, uuids: Sequence[str]) -> bool:
    return gpu.isdigit() and int(gpu) < len(uuids)


def _sentence(count: int, taken: Mapping[str, str]) -> str:
    who = ", ".join(f"GPU {gpu} is held by {holder}" for gpu, holder in taken.items())
    return f"waiting for {count} free GPU{'s' if count > 1 else ''}: {who}"
