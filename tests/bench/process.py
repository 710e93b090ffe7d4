"""The processes of a bench: the only rank of a group, or the ranks of a case apart, with a time limit."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from tasks.training.engine import start

STARTED = time.monotonic()
LOOK = 0.05
"""Seconds between two looks at processes that run."""


def start_here(device: str) -> torch.device:
    """This process's device, as one of the ranks that `printed_apart` or torchrun started, or as one alone."""
    return start(device) if "RANK" in os.environ else start_alone(device)


def start_alone(device: str) -> torch.device:
    """This process's device, as the one rank of a process group of its own."""
    os.environ.update(rank_environment(0, 1, free_port()))
    return start(device)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set, on one machine."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def printed_apart(what: str, command: Sequence[str], seconds: int, ranks: int = 0) -> list[str] | None:
    """The lines that a command prints; None if it failed or took too long, which is then said.

    Args:
        ranks: start it as so many ranks of one group, of which the first one's lines count; 0: as it is.

    Each process leads a session of its own, all of which is ended with it: workers that compile kernels would outlive
    it, and keep its GPU. Where one rank fails, the others, which would wait for it, are ended.
    """
    with _running(command, ranks) as processes:
        end = time.monotonic() + seconds
        codes: list[int | None] = [None]
        while any(code is None for code in codes) and not any(codes) and time.monotonic() < end:
            time.sleep(LOOK)
            codes = [process.popen.poll() for process in processes]
        failed = next((index for index, code in enumerate(codes) if code), None)
        if failed is not None:
            rank = f", rank {failed}," if ranks else ""
            print(f"{what}{rank} failed:\n{processes[failed].errors()[-3000:]}", flush=True)
            return None
        if None in codes:
            said = processes[codes.index(None)].errors()[-1500:]
            print(f"{what}: not done within {seconds} s; it had said:\n{said}", flush=True)
            return None
        return processes[0].output.read_text().splitlines()


class _Process:
    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        # Files, not pipes: nobody has to read them, and no worker that lives on can hold them open.
        folder.mkdir()
        self.output, self._errors = folder / "output", folder / "errors"
        with self.output.open("w") as output, self._errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, *command],
                stdout=output,
                stderr=errors,
                env=os.environ | environment,
                start_new_session=True,
            )

    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def end(self) -> None:
        """With all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


@contextmanager
def _running(command: Sequence[str], ranks: int) -> Iterator[list[_Process]]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        processes = []
        for rank in range(max(1, ranks)):
            environment = rank_environment(rank, ranks, port) if ranks else {}
            processes.append(_Process(command, Path(folder) / str(rank), environment))
            stack.callback(processes[-1].end)
        yield processes


def said(what: str) -> None:
    """Tell on stderr where a case is, which `printed_apart` shows of one that is ended at its limit."""
    print(f"{time.monotonic() - STARTED:6.1f} s after the imports: {what}", file=sys.stderr, flush=True)
