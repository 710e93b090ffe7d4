"""Stands for the flow process: `python owner.py PROCESSES MODE FOLDER GRACE [fork]` runs sleeping ranks."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from infra.launch import Launch, run


class TerminationError(BaseException):
    """As Prefect's TerminationSignal: raised in the main thread by SIGTERM."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise TerminationError


def main(processes: str, mode: str, folder: str, grace: str, fork: str = "") -> None:
    signal.signal(signal.SIGTERM, terminate)
    outcome = run(
        "sleeping_rank",
        [mode, folder],
        log=Path(folder, "log"),
        launch=Launch(processes=int(processes), grace_seconds=float(grace)),
        env={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        on_line=lambda line: hold_the_pipes(Path(folder)) if fork and "is ready" in line else None,
    )
    Path(folder, "outcome").write_text(json.dumps(asdict(outcome)))


def hold_the_pipes(folder: Path) -> None:
    """As a pool of workers made by fork does: leaves a child that has all of the owner's open pipes."""
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    (folder / "forked").write_text(str(child))


if __name__ == "__main__":
    main(*sys.argv[1:])
