"""The process of a bench: the only rank of its group, or one of a case alone, with a time limit."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from tasks.training.engine import start

STARTED = time.monotonic()


def start_alone(device: str) -> torch.device:
    """This process's device, as the one rank of a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ports = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ports.items()})
    return start(device)


def printed_apart(what: str, command: Sequence[str], seconds: int) -> list[str] | None:
    """The lines that a command prints; None if it failed or took too long, which is then said.

    It leads a session of its own, all of which is ended with it: workers that compile kernels would outlive it, hold
    its output open, and keep the bench waiting for ever.
    """
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, errors = process.communicate()
        print(f"{what}: not done within {seconds} s; it had said:\n{errors[-1500:]}", flush=True)
        return None
    if process.returncode:
        print(f"{what} failed:\n{errors[-1500:]}", flush=True)
        return None
    return output.splitlines()


def said(what: str) -> None:
    """Tell on stderr where a case is, which `printed_apart` shows of one that is ended at its limit."""
    print(f"{time.monotonic() - STARTED:6.1f} s after the imports: {what}", file=sys.stderr, flush=True)
