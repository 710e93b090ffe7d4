"""Every way in which a run can end, on real processes that only sleep: afterwards none of them is left."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from infra.launch import SECONDS_WITHOUT_A_RANK

WAYS = ["SIGTERM to owner", "SIGINT to owner", "kill -9 to owner", "kill -9 to supervisor", "kill -9 to launcher"]


# One rank is its own launcher: killed, it cannot write anything.
@pytest.mark.parametrize(("processes", "how"), [(1, how) for how in WAYS[:-1]] + [(2, how) for how in WAYS])
def test_graceful_ranks_write_their_checkpoint_and_nothing_is_left(start: Any, processes: int, how: str) -> None:
    cell = start(processes, "graceful")
    cell.wait_until_ready()
    cell.end(how)
    cell.seconds_until_gone(cell.grace + 4)
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
    cell.end(how)
    seconds = cell.seconds_until_gone(cell.grace + 4)
    assert seconds > cell.grace - 0.5
    if not how.endswith("owner"):
        assert cell.outcome()["exit_code"] == 137


@pytest.mark.parametrize("processes", [1, 2])
def test_normal_end(start: Any, processes: int) -> None:
    cell = start(processes, "done")
    outcome = cell.outcome()
    assert outcome["exit_code"] == 0
    assert sorted(outcome["tail"]) == [f"rank {rank} is ready" for rank in range(processes)]
    assert cell.alive() == {}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_rank_gives_its_code_and_its_last_words(start: Any, processes: int) -> None:
    cell = start(processes, "fails")
    outcome = cell.outcome()
    assert outcome["exit_code"] == 3
    assert "the reason of the failure" in outcome["tail"][-2:]  # another rank may have the last word
    assert cell.alive() == {}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_that_hang_when_one_was_killed_are_not_given_the_grace(start: Any, launcher: str) -> None:
    cell = start(2, "stubborn", grace_seconds=25, launcher=launcher)
    cell.wait_until_ready()
    os.kill(cell.pid_of_rank(1), signal.SIGKILL)
    seconds = cell.seconds_until_gone(SECONDS_WITHOUT_A_RANK + 10)  # the killed rank's child is stubborn, too
    assert seconds > SECONDS_WITHOUT_A_RANK - 0.5
    assert cell.outcome()["exit_code"] not in (0, 75)


def test_what_a_rank_leaves_behind_is_ended(start: Any) -> None:
    cell = start(1, "leaves")
    assert cell.outcome()["exit_code"] == 0
    assert cell.alive() == {}


def test_a_stopped_rank_is_killed_after_the_grace(start: Any) -> None:
    cell = start(1, "stopped")
    cell.wait_until_ready()
    cell.end("SIGTERM to owner")
    cell.seconds_until_gone(cell.grace + 4)


def test_a_second_ctrl_c_ends_the_grace(start: Any) -> None:
    cell = start(1, "stubborn", grace_seconds=25)
    cell.wait_until_ready()
    cell.end("SIGINT to owner")
    cell.wait_for("told.0")
    assert cell.alive()
    cell.end("SIGINT to owner")
    cell.seconds_until_gone(3)


def test_a_forked_child_that_holds_the_pipe_does_not_hide_the_owners_death(start: Any) -> None:
    cell = start(1, "graceful", fork="fork")
    cell.wait_for("forked")
    cell.end("kill -9 to owner")
    forked = int((cell.folder / "forked").read_text())
    cell.seconds_until_gone(cell.grace + 2, besides=(forked,))
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
    cell.seconds_until_gone(cell.grace + 4, besides=sleepers)
    assert len(cell.checkpoints()) == (2 if mode == "graceful" else 0)


def test_sigterm_to_every_process_at_once_still_leaves_time_for_the_checkpoint(start: Any) -> None:
    """As systemd and Slurm do it."""
    cell = start(2, "graceful")
    cell.wait_until_ready()
    for pid in cell.alive():
        os.kill(pid, signal.SIGTERM)
    cell.seconds_until_gone(cell.grace + 4)
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
    first.end("SIGTERM to owner")
    third.wait_until_ready()
    assert (third.folder / "ready.0").read_text() == (first.folder / "ready.0").read_text()


@pytest.mark.usefixtures("leases")
def test_the_lease_of_a_killed_flow_lasts_until_its_ranks_are_gone(start: Any) -> None:
    first = start(2, "stubborn", name="first", gpus=["0", "1"])
    first.wait_until_ready()
    second = start(1, "done", name="second", gpus=["0", "1"])
    second.wait_for("waits")
    first.end("kill -9 to owner")
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
    assert cell.alive() == {}


def test_a_rank_that_was_stopped_by_sigstop_is_found_and_ended(start: Any) -> None:
    cell = start(1, "stopped", stall_seconds=2)
    outcome = cell.outcome()
    assert outcome["stalled"]
    assert "sleeping_rank.py" in (cell.folder / "log").read_text()
    assert cell.alive() == {}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM to owner", "SIGINT to owner", "kill -9 to owner", "kill -9 to launcher"])
def test_graceful_ranks_under_deepspeeds_launcher(start: Any, how: str) -> None:
    cell = start(2, "graceful", launcher="deepspeed")
    cell.wait_until_ready()
    cell.end(how)
    cell.seconds_until_gone(cell.grace + 4)
    assert cell.checkpoints() == ["checkpoint.0", "checkpoint.1"]
    if not how.endswith("owner"):
        assert cell.outcome()["exit_code"] == 75


@pytest.mark.slow
def test_stubborn_ranks_under_deepspeeds_launcher(start: Any) -> None:
    cell = start(2, "stubborn", launcher="deepspeed")
    cell.wait_until_ready()
    cell.end("kill -9 to owner")
    cell.seconds_until_gone(cell.grace + 4)


@pytest.mark.slow
def test_a_failing_rank_under_deepspeeds_launcher(start: Any) -> None:
    outcome = start(2, "fails", launcher="deepspeed").outcome()
    assert outcome["exit_code"] == 3
    assert outcome["tail"][-1] == "the reason of the failure"


@pytest.mark.slow
@pytest.mark.usefixtures("leases")
def test_deepspeeds_launcher_hides_no_leased_gpu(start: Any) -> None:
    cell = start(2, "done", launcher="deepspeed", gpus=["3", "1", "2"])
    assert cell.outcome()["exit_code"] == 0
    assert {(cell.folder / f"ready.{rank}").read_text() for rank in (0, 1)} == {"3,1"}
