"""The real Prefect server with the pinned versions: it boots, holds a block, and dies with its owner."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.gpu import GpuInfrastructure, available, register, resolve
from infra.servers import healthy, running_prefect_server

ROOT = Path(__file__).parents[3]


def test_the_owned_server_boots_saves_blocks_and_dies_with_its_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "programs" / "server_owner.py", tmp_path],
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
    )
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "ready").exists():
            assert owner.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        url = running_prefect_server(tmp_path)
        assert url is not None
        with temporary_settings({PREFECT_API_URL: url}):
            _blocks_are_saved_and_win_over_the_shipped_ones()
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    died = time.monotonic()
    while healthy(f"{url}/health"):
        assert time.monotonic() - died < 8
        time.sleep(0.1)
    assert running_prefect_server(tmp_path) is None


def _blocks_are_saved_and_win_over_the_shipped_ones() -> None:
    assert resolve("local-cpu-2").processes == 2  # not saved yet: the shipped one
    assert {saved for _, saved in available().values()} == {False}  # Prefect does not know the type yet
    assert "one-node" in register()
    assert resolve("one-node").processes == 8
    GpuInfrastructure(device="cpu", processes_per_node=3, secret_env={"K": "v"}).save("local-cpu-2", overwrite=True)
    saved = resolve("local-cpu-2")
    assert saved.processes == 3
    assert saved.launch().env["K"] == "v"
    GpuInfrastructure(gpus_per_node=4, launcher="deepspeed", work_pool="gpus").save("our-node", overwrite=True)
    block, is_saved = available()["our-node"]
    assert (block.launcher, block.work_pool, is_saved) == ("deepspeed", "gpus", True)
    with pytest.raises(ValueError, match="did you mean 'one-gpu'"):
        resolve("one-gp")
