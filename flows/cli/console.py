"""What the commands print: two consoles, the progress of a run, and its tables."""

import threading
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from flows.retrain import Result
    from tasks.stages import StageRef

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 30.0
"""Of progress where the output is no terminal."""


class RunDisplay:
    """The progress of a run: bars for the steps that run, a line for each that is done. A `tasks.watch.Watcher`."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[place]}"),
            TextColumn("[dim]{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._bars: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._printed: dict[str, float] = {}

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def waiting(self, text: str) -> None:
        """A bar without an end, until the next step begins."""
        self.started(text)

    def started(self, step: str) -> None:
        with self._lock:
            if step not in self._bars:
                self._bars[step] = self._progress.add_task(title(step), total=None, place="", metrics="", left="")

    def ended(self, step: str) -> None:
        """Takes a step's bar away."""
        with self._lock:
            if (bar := self._bars.pop(step, None)) is not None:
                self._progress.remove_task(bar)

    def progressed(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.started(step)
        shown = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        place = f"{done}/{total}"
        bar = self._bars[step]
        self._progress.update(bar, completed=done, total=total, place=place, metrics=shown)
        seconds = next((task.time_remaining for task in self._progress.tasks if task.id == bar), None)
        if seconds is not None:
            self._progress.update(bar, left=f"{duration(seconds)} left")
        now = time.monotonic()
        if not console.is_terminal and now - self._printed.setdefault(step, now) >= SECONDS_BETWEEN_LINES:
            self._printed[step] = now
            console.print(f"  {title(step)}: {place}  {shown}".rstrip())

    def finished(self, step: str, ref: "StageRef") -> None:
        from tasks.headlines import headline

        self.ended(step)
        mark, time_spent = ("[cyan]=[/]", "cached") if ref.cached else ("[green]✓[/]", duration(ref.seconds))
        console.print(
            f"{mark} {title(step):<48} {time_spent:>12}  [dim]{headline(ref.stage, ref.metrics)}[/]", soft_wrap=True
        )

    def said(self, text: str) -> None:
        console.print(f"[yellow]{text}[/]", soft_wrap=True)


def title(step: str) -> str:
    """A step's key as people read it: `clean:Dahoas/rm-static` is "clean Dahoas/rm-static"."""
    return step.replace(":", " ", 1)


def duration(seconds: float) -> str:
    """A time as people say it."""
    from tasks.page import duration

    return duration(seconds)


def printable(text: str) -> str:
    """A model's or a data set's text without the control characters that would steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def table(columns: Sequence[str], lines: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; the columns of `right` are aligned there."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for line in lines:
        made.add_row(*line)
    return made


def result(run: "Result") -> None:
    """What a run came to."""
    lines = [
        (r.step, "–" if r.cached else duration(r.seconds), "yes" if r.cached else "no", r.metric) for r in run.rows
    ]
    console.print()
    console.print(table(("step", "time", "cached", "main metric"), lines, right=("time",)))
    console.print()
    for name, version in run.versions.items():
        console.print(f"[bold]{name}[/] version {version}", soft_wrap=True)
    if run.verdict is not None:
        console.print(run.verdict.reason, soft_wrap=True)
    if run.mlflow_url:
        console.print(f"MLflow: {run.mlflow_url}", soft_wrap=True)
    console.print(f"Report: {run.report}", soft_wrap=True)
