"""Ports and GPUs of this machine."""

import os
import socket
from pathlib import Path

import pytest

from infra import machine


def test_a_port_in_use_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server, socket.socket() as other:
        for taken in (server, other):
            taken.bind(("127.0.0.1", 0))
        server.listen()
        free = other.getsockname()[1]
        other.close()
        monkeypatch.setattr(machine, "SERVER_PORTS", [server.getsockname()[1], free])
        assert {machine.free_port() for _ in range(20)} == {free}


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H100 (UUID: GPU-2)'", 2),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", 0),
    ],
)
def test_gpus_are_counted_by_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, count: int
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.gpu_count() == count
