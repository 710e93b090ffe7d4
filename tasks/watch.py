"""What happens in a run, told as it happens: to the console of `rlhf run`, or to nobody.

Prefect's UI gets its own (states, artifacts); a terminal wants less, at once, and in this process.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from tasks.stages import StageRef


class Watcher(Protocol):
    """Called from the flow's thread and from those of mapped tasks."""

    def started(self, step: str) -> None:
        """A step begins, by its key; whether it is done already is not known yet."""

    def progressed(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step is at `done` of `total`."""

    def finished(self, step: str, ref: StageRef) -> None:
        """A step is done; `ref.cached` says whether anything was computed."""

    def said(self, text: str) -> None:
        """Something that the user should know meanwhile."""


class Nobody:
    """Watches nothing: the default."""

    def started(self, step: str) -> None: ...

    def progressed(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def finished(self, step: str, ref: StageRef) -> None: ...

    def said(self, text: str) -> None: ...


_WATCHER: ContextVar[Watcher] = ContextVar("watcher", default=Nobody())  # noqa: B039 (it holds no state)


def watcher() -> Watcher:
    """Who watches this run."""
    return _WATCHER.get()


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tells `watcher` what happens in the block, and in tasks that it maps over threads."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)
