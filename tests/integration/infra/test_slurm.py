"""Two ranks under a real Slurm of this machine: run, fail, stop with a checkpoint or without, kill -9 of the flow."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from infra.machine import free_port
from infra.owned import OwnedProcess

pytestmark = [
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="needs Slurm (Debian: apt install slurm-wlm)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons start jobs of other users, so they need root"),
]
GRACE = 6.0  # seconds; infra.slurm keeps three of them for Slurm to kill what does not stop

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The daemons of a cluster that is this machine, until the module's end."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(
            host=socket.gethostname(),
            folder=folder,
            controller_port=free_port(),
            daemon_port=free_port(),
            cores=len(os.sched_getaffinity(0)),
        )
    )
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'munge.sock'}"]
    munge += [f"--{name}={folder / name}" for name in ("pid-file", "log-file", "seed-file")]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        patch.setenv("SLURM_CONF", str(config))
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            process = OwnedProcess(command, env={}, output=log, grace_seconds=5)
            stack.callback(process.stop)
            time.sleep(1)
        give_up = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo"], capture_output=True, text=True, check=False).stdout:
            assert time.monotonic() < give_up, (folder / "log").read_text()
            time.sleep(0.2)
        yield


def jobs() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


def test_two_ranks_run_to_their_end(start: Any) -> None:
    cell = start(2, "done", launcher="slurm")
    assert cell.outcome()["exit_code"] == 0
    assert (cell.folder / "ready.1").exists()


def test_a_failing_rank_ends_the_other_and_gives_its_code(start: Any) -> None:
    cell = start(2, "fails", launcher="slurm", grace_seconds=GRACE)
    outcome = cell.outcome()
    assert outcome["exit_code"] == 3
    assert "the reason of the failure" in outcome["tail"]
    cell.seconds_until_gone(5)


@pytest.mark.parametrize("how", ["SIGTERM to owner", "kill -9 to owner", "kill -9 to supervisor"])
def test_a_stop_leaves_checkpoints_and_no_job(start: Any, how: str) -> None:
    cell = start(2, "graceful", launcher="slurm", grace_seconds=GRACE)
    cell.wait_until_ready()
    assert "rlhf" in jobs()
    cell.end(how)
    cell.seconds_until_gone(GRACE + 4)
    assert cell.checkpoints() == ["checkpoint.0", "checkpoint.1"]
    give_up = time.monotonic() + 10
    while "rlhf" in jobs():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def test_ranks_that_ignore_the_stop_are_killed_by_slurm(start: Any) -> None:
    cell = start(2, "stubborn", launcher="slurm", grace_seconds=GRACE)
    cell.wait_until_ready()
    cell.end("kill -9 to owner")
    assert cell.seconds_until_gone(GRACE + 6) > GRACE - 4
    assert cell.checkpoints() == []
