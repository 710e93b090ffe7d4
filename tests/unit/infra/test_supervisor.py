"""The supervisor's own command line; what it does when something is killed is tested in tests/integration/infra."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra import supervisor


def supervise(*command: str, owner: int | None = None) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            supervisor.__file__,
            "--owner",
            str(owner or os.getpid()),
            "--grace",
            "5",
            "--",
            *command,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        code = process.wait(timeout=20)
        return subprocess.CompletedProcess(command, code, process.stdout.read())


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + signal.SIGTERM)])
def test_the_exit_code_is_the_command_s(script: str, code: int) -> None:
    assert supervise("sh", "-c", script).returncode == code


def test_a_command_that_is_not_there_is_named() -> None:
    done = supervise("/no/such/program")
    assert done.returncode == 127
    assert done.stdout == "cannot start /no/such/program: No such file or directory\n"


def test_nothing_is_started_for_an_owner_that_is_gone(tmp_path: Path) -> None:
    assert supervise("touch", str(tmp_path / "ran"), owner=os.getppid()).returncode == 143
    assert not (tmp_path / "ran").exists()


def test_the_command_gets_no_pipe_of_the_owner_and_default_signals() -> None:
    script = "import os, signal; print(os.readlink('/proc/self/fd/0'), open('/proc/self/status').read())"
    done = supervise(sys.executable, "-S", "-c", script)
    status = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert done.stdout.startswith("/dev/null")
    assert int(status["SigBlk"], 16) == 0


def test_descendants_go_through_sessions() -> None:
    outer = subprocess.Popen(["setsid", "sh", "-c", "setsid sleep 30 & echo started; wait"], stdout=subprocess.PIPE)
    assert outer.stdout is not None
    with outer.stdout:
        outer.stdout.readline()
        found = supervisor.descendants(os.getpid())
        try:
            assert outer.pid in found
            assert len(supervisor.descendants(outer.pid)) == 1
        finally:
            for pid in found:
                supervisor.send(pid, signal.SIGKILL)
            outer.wait()
    assert outer.pid not in supervisor.descendants(os.getpid())
