"""The owner's side of the supervisor: a command that ends when this process ends, however it ends.

Used by the launcher of training processes and by the servers that `rlhf` starts for itself.
"""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL
from typing import IO

from infra.supervisor import HURRY_SIGNAL, UNKILLABLE_SECONDS, send

SUPERVISOR = Path(__file__).with_name("supervisor.py")
TOKEN = "RLHF_OWNED"  # environment variable that marks every process below one supervisor


class OwnedProcess:
    """A command under a supervisor of its own.

    The supervisor has a session of its own, so that a Ctrl-C in the terminal reaches the owner alone, which then
    decides. If this object is lost to an exception, its pipe closes with it and the command is taken down.
    """

    def __init__(
        self,
        command: list[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
        output: int | IO[bytes] = subprocess.PIPE,
        grace_seconds: float = 20.0,
        keep: Sequence[int] = (),
    ) -> None:
        """Starts at once; `env` is added to this process's environment, `output` takes stdout and stderr.

        `keep` are open files that the supervisor holds until it ends, such as a lease.
        """
        self.grace_seconds = grace_seconds
        self.token = uuid.uuid4().hex
        self._supervisor = subprocess.Popen(
            [
                *[sys.executable, "-I", "-S", str(SUPERVISOR)],
                *["--owner", str(os.getpid()), "--grace", str(grace_seconds), "--", *command],
            ],
            env={**os.environ, **env, TOKEN: self.token},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep,
        )

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        return self._supervisor.pid

    def values_of(self, variable: str) -> set[str]:
        """What an environment variable is in the live processes of the command, where it is set."""
        mark, name = f"{TOKEN}={self.token}".encode(), f"{variable}=".encode()
        return {
            entry.removeprefix(name).decode()
            for _, environment in _environments()
            if mark in environment
            for entry in environment
            if entry.startswith(name)
        }

    @property
    def stdout(self) -> IO[bytes]:
        """The merged output, when `output` is a pipe."""
        assert self._supervisor.stdout is not None
        return self._supervisor.stdout

    @property
    def exit_code(self) -> int | None:
        """The command's exit code, 128 + signal after a signal; None while it or anything below it runs."""
        code = self._supervisor.poll()
        return None if code is None else code if code >= 0 else 128 - code

    def ask_to_stop(self) -> None:
        """Starts the grace: SIGTERM now, SIGKILL to all that is left once `grace_seconds` are over."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()

    def stop(self, meanwhile: Callable[[float], object] = time.sleep) -> int:
        """Stops the command if it runs, waits until no process of it is left and returns its exit code.

        `meanwhile` is called with a number of seconds to spend, for a caller that has a pipe to drain. A
        KeyboardInterrupt (or Prefect's TerminationSignal) during the wait ends the grace at once and is raised
        again when all is gone.
        """
        interrupt: BaseException | None = None
        self.ask_to_stop()
        limit = time.monotonic() + self.grace_seconds + UNKILLABLE_SECONDS + 2.0
        while self._supervisor.poll() is None:
            try:
                if time.monotonic() > limit:
                    self._supervisor.kill()  # it is stuck itself, or stopped by SIGSTOP: the sweep below does its work
                meanwhile(0.05)
            except BaseException as raised:
                interrupt = raised
                self._supervisor.send_signal(HURRY_SIGNAL)
                limit = min(limit, time.monotonic() + UNKILLABLE_SECONDS + 2.0)
                meanwhile = time.sleep
        if self._supervisor.returncode < 0:
            self._sweep(meanwhile)
        if interrupt is not None:
            raise interrupt
        assert self.exit_code is not None
        return self.exit_code

    def _sweep(self, meanwhile: Callable[[float], object]) -> None:
        # Somebody killed the supervisor itself. The launcher got SIGTERM by its death signal; wait for a checkpoint.
        give_up = time.monotonic() + self.grace_seconds
        try:
            while time.monotonic() < give_up and processes_with(TOKEN, self.token):
                meanwhile(0.05)
        finally:
            kill_processes_with(TOKEN, self.token)


def processes_with(name: str, value: str) -> list[int]:
    """The pids of the live processes (of this user) that were started with that environment variable."""
    wanted = f"{name}={value}".encode()
    return [pid for pid, environment in _environments() if wanted in environment]


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                yield int(entry), Path("/proc", entry, "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended meanwhile, or is another user's


def kill_processes_with(name: str, value: str) -> None:
    """SIGKILL to those processes until none is left, for `UNKILLABLE_SECONDS` at most."""
    give_up = time.monotonic() + UNKILLABLE_SECONDS
    while (alive := processes_with(name, value)) and time.monotonic() < give_up:
        for pid in alive:
            send(pid, SIGKILL)
        time.sleep(0.02)
