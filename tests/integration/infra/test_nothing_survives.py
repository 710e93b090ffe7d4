"""Every way in which a run can end, on real processes that only sleep: afterwards none of them is left."""

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
GRACE = 1.5  # seconds; a checkpoint of the sleeping rank takes 0.5
TOKEN = "RLHF_TEST_TOKEN"


class Cell:
    """One owner with its supervisor, launcher and ranks; every process carries a token in its environment."""

    def __init__(self, folder: Path, processes: int, mode: str, fork: str = "", **launch: Any) -> None:
        self.folder, self.processes, self.token = folder, processes, uuid.uuid4().hex
        fields = {"processes": processes, "grace_seconds": GRACE} | launch
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
        assert self.owner.wait(timeout=30) == 0
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


def end(cell: Cell, how: str) -> None:
    number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "kill -9": signal.SIGKILL}
    name, _, who = how.partition(" to ")
    os.kill(cell.owner.pid if who == "owner" else cell.pid_of(who), number[name])


WAYS = ["SIGTERM to owner", "SIGINT to owner", "kill -9 to owner", "kill -9 to supervisor", "kill -9 to launcher"]


# One rank is its own launcher: killed, it cannot write anything.
@pytest.mark.parametrize(("processes", "how"), [(1, how) for how in WAYS[:-1]] + [(2, how) for how in WAYS])
def test_graceful_ranks_write_their_checkpoint_and_nothing_is_left(start: Any, processes: int, how: str) -> None:
    cell = start(processes, "graceful")
    cell.wait_until_ready()
    end(cell, how)
    cell.seconds_until_gone(GRACE + 4)
    assert cell.checkpoints() == [f"checkpoint.{rank}" for rank in range(processes)]
    if not how.endswith("owner"):
        assert cell.outcome()["exit_code"] == 75


# SIGINT and SIGTERM to the owner part company in `run` alone, which one process shows as well as two.
@pytest.mark.parametrize(
    ("processes", "how"), [(1, how) for how in WAYS] + [(2, how) for how in WAYS if how != "SIGINT to owner"]
)
def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(start: Any, processes: int, how: str) -> None:
    cell = start(processes, "stubborn")
    cell.wait_until_ready()
    end(cell, how)
    seconds = cell.seconds_until_gone(GRACE + 4)
    assert seconds > GRACE - 0.5
    if not how.endswith("owner"):
        assert cell.outcome()["exit_code"] == 137


@pytest.mark.parametrize("processes", [1, 2])
def test_normal_end(start: Any, processes: int) -> None:
    cell = start(processes, "done")
    outcome = cell.outcome()
    assert outcome["exit_code"] == 0
    assert sorted(outcome["tail"]) == [f"rank {rank} is ready" for rank in range(processes)]
    assert cell.seconds_until_gone(0.5) < 0.5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_rank_gives_its_code_and_its_last_words(start: Any, processes: int) -> None:
    cell = start(processes, "fails")
    outcome = cell.outcome()
    assert outcome["exit_code"] == 3
    assert "the reason of the failure" in outcome["tail"][-2:]  # another rank may have the last word
    assert cell.seconds_until_gone(0.5) < 0.5


def test_what_a_rank_leaves_behind_is_ended(start: Any) -> None:
    cell = start(1, "leaves")
    assert cell.outcome()["exit_code"] == 0
    assert cell.seconds_until_gone(0.5) < 0.5


def test_a_stopped_rank_is_killed_after_the_grace(start: Any) -> None:
    cell = start(1, "stopped")
    cell.wait_until_ready()
    end(cell, "SIGTERM to owner")
    cell.seconds_until_gone(GRACE + 4)


def test_a_second_ctrl_c_ends_the_grace(start: Any) -> None:
    cell = start(1, "stubborn", grace_seconds=25)
    cell.wait_until_ready()
    end(cell, "SIGINT to owner")
    time.sleep(0.5)
    assert cell.alive()
    end(cell, "SIGINT to owner")
    cell.seconds_until_gone(3)


def test_a_forked_child_that_holds_the_pipe_does_not_hide_the_owners_death(start: Any) -> None:
    cell = start(1, "graceful", fork="fork")
    cell.wait_for("forked")
    end(cell, "kill -9 to owner")
    forked = int((cell.folder / "forked").read_text())
    cell.seconds_until_gone(GRACE + 2, besides=(forked,))
    assert cell.checkpoints() == ["checkpoint.0"]


@pytest.mark.parametrize(("processes", "mode"), [(1, "stubborn"), (2, "graceful")])
def test_killing_all_that_stands_above_the_ranks_leaves_no_rank(start: Any, processes: int, mode: str) -> None:
    cell = start(processes, mode)
    cell.wait_until_ready()
    above = [cell.owner.pid, cell.pid_of("supervisor")] + ([cell.pid_of("launcher")] if processes > 1 else [])
    sleepers = tuple(pid for pid, line in cell.alive().items() if line.startswith("sleep "))
    for pid in above:
        os.kill(pid, signal.SIGKILL)
    # The ranks end by themselves; a stubborn rank's own child has nobody left who could know of it.
    cell.seconds_until_gone(GRACE + 4, besides=sleepers)
    assert len(cell.checkpoints()) == (2 if mode == "graceful" else 0)


def test_sigterm_to_every_process_at_once_still_leaves_time_for_the_checkpoint(start: Any) -> None:
    """As systemd and Slurm do it."""
    cell = start(2, "graceful")
    cell.wait_until_ready()
    for pid in cell.alive():
        os.kill(pid, signal.SIGTERM)
    cell.seconds_until_gone(GRACE + 4)
    assert len(cell.checkpoints()) == 2


@pytest.fixture
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that only their lock files know of."""
    monkeypatch.setenv("RLHF_GPU_LEASES", str(tmp_path / "leases"))


@pytest.mark.usefixtures("leases")
def test_two_runs_share_no_gpu_and_a_third_waits_until_one_has_ended(start: Any) -> None:
    first, second = (start(1, "graceful", name=name, gpus=["0", "1"]) for name in ("first", "second"))
    for cell in (first, second):
        cell.wait_until_ready()
    assert {(cell.folder / "ready.0").read_text() for cell in (first, second)} == {"0", "1"}
    third = start(1, "graceful", name="third", gpus=["0", "1"])
    third.wait_for("waits")
    assert (third.folder / "waits").read_text().startswith("waiting for 1 free GPU: GPU 0 is held by process ")
    end(first, "SIGTERM to owner")
    third.wait_until_ready()
    assert (third.folder / "ready.0").read_text() == (first.folder / "ready.0").read_text()


@pytest.mark.usefixtures("leases")
def test_the_lease_of_a_killed_flow_lasts_until_its_ranks_are_gone(start: Any) -> None:
    first = start(2, "stubborn", name="first", gpus=["0", "1"])
    first.wait_until_ready()
    second = start(1, "done", name="second", gpus=["0", "1"])
    second.wait_for("waits")
    end(first, "kill -9 to owner")
    while first.alive():
        assert not (second.folder / "ready.0").exists()
        time.sleep(0.05)
    second.wait_until_ready()
    assert second.outcome()["exit_code"] == 0


def test_a_step_that_says_nothing_leaves_its_stacks_and_is_stopped(start: Any) -> None:
    cell = start(2, "graceful", stall_seconds=8)  # torchrun itself says nothing for some seconds
    cell.wait_until_ready()
    outcome = cell.outcome()
    assert outcome["stalled"]
    assert outcome["exit_code"] == 75
    log = (cell.folder / "log").read_text()
    assert log.count("most recent call first") >= 2
    assert "sleeping_rank.py" in log
    assert cell.seconds_until_gone(0.5) < 0.5


def test_a_rank_that_was_stopped_by_sigstop_is_found_and_ended(start: Any) -> None:
    cell = start(1, "stopped", stall_seconds=2)
    outcome = cell.outcome()
    assert outcome["stalled"]
    assert "sleeping_rank.py" in (cell.folder / "log").read_text()
    assert cell.seconds_until_gone(0.5) < 0.5


@pytest.mark.parametrize("how", ["SIGTERM to owner", "SIGINT to owner", "kill -9 to owner", "kill -9 to launcher"])
def test_graceful_ranks_under_deepspeeds_launcher(start: Any, how: str) -> None:
    cell = start(2, "graceful", launcher="deepspeed")
    cell.wait_until_ready()
    end(cell, how)
    cell.seconds_until_gone(GRACE + 4)
    assert cell.checkpoints() == ["checkpoint.0", "checkpoint.1"]
    if not how.endswith("owner"):
        assert cell.outcome()["exit_code"] == 75


def test_stubborn_ranks_under_deepspeeds_launcher(start: Any) -> None:
    cell = start(2, "stubborn", launcher="deepspeed")
    cell.wait_until_ready()
    end(cell, "kill -9 to owner")
    cell.seconds_until_gone(GRACE + 4)


def test_a_failing_rank_under_deepspeeds_launcher(start: Any) -> None:
    outcome = start(2, "fails", launcher="deepspeed").outcome()
    assert outcome["exit_code"] == 3
    assert outcome["tail"][-1] == "the reason of the failure"


@pytest.mark.usefixtures("leases")
def test_deepspeeds_launcher_hides_no_leased_gpu(start: Any) -> None:
    cell = start(2, "done", launcher="deepspeed", gpus=["3", "1", "2"])
    assert cell.outcome()["exit_code"] == 0
    assert {(cell.folder / f"ready.{rank}").read_text() for rank in (0, 1)} == {"3,1"}
