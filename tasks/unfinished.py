"""The stages of a deployment's runs that have not come to their end, which `rlhf prune` spares.

A run that crashed has no process until Prefect starts it again, and holds nothing. So the file
`<workspace>/unfinished/<flow run>` lists the stage directories that it has come to, finished or not: its next try goes
on from them.
"""

import os
import time
from pathlib import Path

FOLDER = "unfinished"
DAYS = 7.0
"""A run that got no further for so long is taken for given up: cancelled, or its deployment is gone."""


def note(workspace: Path, flow_run_id: str, directory: Path) -> None:
    """Before a run makes a stage, or finds it."""
    path = workspace / FOLDER / flow_run_id
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:  # one short line: tasks of one run write at once
        file.write(f"{directory.relative_to(workspace)}\n")


def suspended(workspace: Path, flow_run_id: str, hours: float) -> None:
    """The run waits for a person, for so long at most: its days begin when that is over."""
    path = workspace / FOLDER / flow_run_id
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    until = time.time() + hours * 3600
    os.utime(path, (until, until))


def forget(workspace: Path, flow_run_id: str) -> None:
    """The run has come to its end, or failed: it does not start again by itself."""
    (workspace / FOLDER / flow_run_id).unlink(missing_ok=True)


def needed(workspace: Path) -> set[Path]:
    """The stage directories, resolved, of all runs that may go on."""
    oldest = time.time() - DAYS * 24 * 3600
    lists = [path for path in (workspace / FOLDER).glob("*") if path.stat().st_mtime > oldest]
    return {(workspace / line).resolve() for path in lists for line in path.read_text().splitlines()}
