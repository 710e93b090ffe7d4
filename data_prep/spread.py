"""Shards of a step's work spread over the workers of a Dask cluster, with the outcome of the built-in `map`.

A worker needs this project installed, and the same versions of everything. What it is sent and sends back passes over
the network; files are read and written by the caller alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or one that makes the calls elsewhere; results come in the order of the items."""
SHARDS_AHEAD = 2
"""Of each thread of the cluster: it never waits for work, and the caller never holds more."""


@contextmanager
def over_cluster(address: str) -> Iterator[Mapper]:
    """A `map` whose calls are made by the workers of the Dask scheduler at `address` (tcp://host:port).

    The function has to be importable there, items and results have to be picklable. What a call raises is raised here.
    """
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        ahead = SHARDS_AHEAD * max(1, sum(client.nthreads().values()))

        def mapped(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            waiting: deque[Any] = deque()
            for item in items:
                waiting.append(client.submit(function, item, pure=False))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield mapped
