"""What a training stage is given and what it may call: the seam between the loops and the process that runs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Stopped(Exception):  # noqa: N818  (not an error)
    """The stage was asked to stop and has written a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step} after a checkpoint")
        self.step = step


class NotFiniteError(ArithmeticError):
    """A loss or score that is no number; running on, or again, would not mend it."""


@dataclass(frozen=True)
class Job:
    """One stage, in one process."""

    stage: str
    directory: Path
    config: Mapping[str, Any]
    """The stage's config as it entered the fingerprint."""
    inputs: Mapping[str, Path]
    device: torch.device
    log: Callable[[int, Mapping[str, float]], None]
    """Metrics of a step, `stage/name` -> value; only rank 0's are kept."""
    progress: Callable[[int, int, Mapping[str, float]], None]
    """Step, of how many, what to show beside it."""
    should_stop: Callable[[], bool]
    """Whether this process was asked to stop."""

    @property
    def phase(self) -> str:
        """The phase of the data that the stage is trained on."""
        return str(self.config.get("phase", self.stage))

    def trusts(self, role: str) -> bool:
        """Whether code that the model of an input brings may run: the config says so, or it is refused."""
        return role in self.config.get("trusted", ())

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"
