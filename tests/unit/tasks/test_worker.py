"""What the launched process sets up before a stage runs in it."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tasks import worker
from tasks.config import SFTConfig
from tasks.training import sft

ROOT = Path(__file__).parents[3]


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("wanted", [False, True])
def test_a_stage_that_asks_for_it_adds_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, as_before: None, wanted: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(worker, "start", lambda device, distributed: torch.device(device))
    monkeypatch.setattr(worker, "keep_ancestry", lambda job: None)
    monkeypatch.setattr(sft, "run", lambda job: {"is": torch.are_deterministic_algorithms_enabled()})
    (tmp_path / "records").mkdir()
    config = SFTConfig(deterministic=wanted).model_dump(mode="json")
    spec = {"config": {"sft": config}, "inputs": {}, "device": "cpu"}
    (tmp_path / "records" / "config.json").write_text(json.dumps(spec))
    with caplog.at_level(logging.INFO, "tasks"):
        assert worker.run("sft", tmp_path, lambda: False) == {"is": wanted}
    assert caplog.messages == ["sft: begins on cpu", "sft: done"]


def test_a_worker_begins_without_packages_that_no_stage_uses() -> None:
    program = """
import sys
from tasks import worker
with worker.left_out("mlflow", "sklearn"):
    import deepspeed, tasks.training.ppo
assert not {"mlflow", "sklearn"} & {name.partition(".")[0] for name in sys.modules}
import sklearn
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"})
