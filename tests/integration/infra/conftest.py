"""A flow's process with its supervisor, launcher and sleeping ranks, for the tests of how a run can end."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[3]
TOKEN = "RLHF_TEST_TOKEN"


class Cell:
    """One owner with its supervisor, launcher and ranks; every process carries a token in its environment."""

    def __init__(self, folder: Path, processes: int, mode: str, fork: str = "", **launch: Any) -> None:
        self.folder, self.processes, self.token = folder, processes, uuid.uuid4().hex
        # A checkpoint takes 0.5 s, the rest is for a busy machine; those that do not heed SIGTERM use their grace up.
        fields = {"processes": processes, "grace_seconds": 5.0 if mode == "graceful" else 1.5} | launch
        self.grace: float = fields["grace_seconds"]
        folder.mkdir(exist_ok=True)
        self.owner = subprocess.Popen(
            [sys.executable, PROGRAMS / "owner.py", folder, mode, json.dumps(fields), fork],
            env={**os.environ, TOKEN: self.token, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            stderr=subprocess.PIPE,
        )

    def wait_until_ready(self) -> None:
        """Until every rank has installed its signal handlers and sleeps."""
        self.wait_for(*[f"ready.{rank}" for rank in range(self.processes)])

    def wait_for(self, *names: str, timeout: float = 60) -> None:
        """Until the files are there."""
        end = time.monotonic() + timeout
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < end, f"no {names} in {sorted(self.folder.iterdir())}"
            time.sleep(0.02)

    def alive(self) -> dict[int, str]:
        """The live processes of this cell and their command lines."""
        wanted, found = f"{TOKEN}={self.token}".encode(), {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def pid_of(self, role: str) -> int:
        """The supervisor's pid, or that of the process that the supervisor started: the launcher, or the one rank."""
        (supervisor,) = [pid for pid, line in self.alive().items() if "supervisor.py" in line]
        if role == "supervisor":
            return supervisor
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return int(children[0])

    def pid_of_rank(self, rank: int) -> int:
        """The pid of one of the ranks."""
        ranks = [pid for pid, line in self.alive().items() if "infra.rank" in line and "torch.distributed" not in line]
        wanted = f"RANK={rank}".encode()
        (pid,) = [pid for pid in ranks if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
        return pid

    def end(self, how: str) -> None:
        """SIGNAL to owner, supervisor or launcher."""
        number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "kill -9": signal.SIGKILL}
        name, _, who = how.partition(" to ")
        os.kill(self.owner.pid if who == "owner" else self.pid_of(who), number[name])

    def seconds_until_gone(self, limit: float, besides: tuple[int, ...] = ()) -> float:
        """How long it takes until no process is left; fails with what is left after `limit` seconds."""
        started = time.monotonic()
        while True:
            self.owner.poll()
            left = {pid: line for pid, line in self.alive().items() if pid not in besides}
            seconds = time.monotonic() - started
            if not left:
                return seconds
            assert seconds < limit, f"left after {seconds:.1f} s: {left}"
            time.sleep(0.05)

    def outcome(self) -> dict[str, Any]:
        """What `run` returned to the owner."""
        assert self.owner.wait(timeout=120) == 0  # on a busy machine DeepSpeed's launcher alone takes half a minute
        return json.loads((self.folder / "outcome").read_text())

    def checkpoints(self) -> list[str]:
        """The files of the ranks that stopped gracefully."""
        return sorted(path.name for path in self.folder.glob("checkpoint.*"))

    def kill_all(self) -> None:
        """For the end of a test that failed."""
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.owner.wait()
        assert self.owner.stderr is not None
        self.owner.stderr.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    cells: list[Cell] = []

    def start_cell(processes: int, mode: str, name: str = "cell", **options: Any) -> Cell:
        cells.append(Cell(tmp_path / name, processes, mode, **options))
        return cells[-1]

    yield start_cell
    for cell in cells:
        cell.kill_all()
