"""Stands for the flow process: `python owner.py FOLDER MODE '{"processes": 2, ...}' [fork]` runs sleeping ranks.

The third argument holds the fields of a Launch.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from whole_files import write

from infra.launch import run
from infra.launchers import Launch


class TerminationError(BaseException):
    """As Prefect's TerminationSignal: raised in the main thread by SIGTERM."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise TerminationError


def main(folder: str, mode: str, fields: str, fork: str = "") -> None:
    signal.signal(signal.SIGTERM, terminate)
    outcome = run(
        "sleeping_rank",
        [mode, folder],
        log=Path(folder, "log"),
        launch=Launch(**json.loads(fields)),
        env={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        on_line=lambda line: hold_the_pipes(Path(folder)) if fork and "is ready" in line else None,
        on_wait=lambda sentence: write(Path(folder, "waits"), sentence),
    )
    Path(folder, "outcome").write_text(json.dumps(asdict(outcome)))


def hold_the_pipes(folder: Path) -> None:
    """As a pool of workers made by fork does: leaves a child that has all of the owner's open pipes."""
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    write(folder / "forked", str(child))


if __name__ == "__main__":
    main(*sys.argv[1:])
