"""Starts the processes of a step on several machines and leaves none behind on any of them.

    python -m infra.hosts --shell "ssh -o BatchMode=yes" --hosts 10.0.0.1,10.0.0.2 -- COMMAND...

On every host a supervisor runs COMMAND, with {node} replaced by the host's number. Its stdin is the connection: when
this process ends, is killed or is cut off, the supervisor there sees the end of it and takes the command down, as it
does for a flow on this machine. The project lies at the same path on all hosts, and so does the workspace.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SUPERVISOR = Path(__file__).with_name("supervisor.py")
FORWARD = "RLHF_FORWARD"
"""Environment variable that names further variables that the hosts are given."""
PREFIXES = ("RLHF_", "TORCH_", "NCCL_", "GLOO_", "HF_", "MLFLOW_", "PYTHON", "OMP_", "DS_")
"""Of the variables that they are given in any case."""


def remote_line(command: list[str], node: int, folder: str, grace: str) -> str:
    """What the remote shell runs: it reads its environment from stdin, where no list of processes shows it."""
    words = [word.replace("{node}", str(node)) for word in command]
    supervisor = shlex.join([sys.executable, "-I", "-S", str(SUPERVISOR), "--grace", grace])
    return (
        f'read -r variables && eval "$variables" && cd {shlex.quote(folder)} && '
        f"exec {supervisor} --owner $PPID -- {shlex.join(words)}"
    )


def variables() -> str:
    """The line that sets the environment of the hosts."""
    named = os.environ.get(FORWARD, "").split(",")
    given = {name: value for name, value in os.environ.items() if name in named or name.startswith(PREFIXES)}
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items() if "\n" not in value)


def main(arguments: list[str]) -> int:
    """Runs the command line of the module docstring; returns the exit code of the first host that failed, else 0."""
    split = arguments.index("--")
    options = dict(zip(arguments[:split:2], arguments[1:split:2], strict=True))
    grace = os.environ.get("RLHF_GRACE_SECONDS", "20")
    steps = []
    for node, host in enumerate(options["--hosts"].split(",")):
        line = remote_line(arguments[split + 1 :], node, os.getcwd(), grace)
        # A session of its own: the SIGTERM that our whole group gets would cut the connection instead of asking.
        step = subprocess.Popen(
            [*shlex.split(options["--shell"]), host, line], stdin=subprocess.PIPE, start_new_session=True
        )
        steps.append(step)
    signal.signal(signal.SIGTERM, lambda number, frame: stop(steps))
    for step in steps:
        assert step.stdin is not None
        with suppress(BrokenPipeError):  # a host that was not reached, which its exit code tells
            step.stdin.write(f"{variables()}\n".encode())
            step.stdin.flush()
    failed = 0
    while any(step.poll() is None for step in steps):
        if not failed and (failed := next((step.returncode for step in steps if step.returncode), 0)):
            stop(steps)
        time.sleep(0.1)
    failed = failed or next((step.returncode for step in steps if step.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def stop(steps: list[subprocess.Popen[bytes]]) -> None:
    """Asks what still runs on the hosts to stop."""
    for step in steps:
        if step.stdin is not None and not step.stdin.closed:
            with suppress(BrokenPipeError):
                step.stdin.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
