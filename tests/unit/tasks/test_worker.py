"""What the launched process sets up before a stage runs in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tasks import evaluate, worker


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("wanted", [False, True])
def test_a_stage_that_asks_for_it_adds_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_before: None, wanted: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(evaluate, "run", lambda job: {"is": torch.are_deterministic_algorithms_enabled()})
    (tmp_path / "records").mkdir()
    spec = {"config": {"evaluate": {"deterministic": wanted}}, "inputs": {}, "device": "cpu"}
    (tmp_path / "records" / "config.json").write_text(json.dumps(spec))
    assert worker.run("evaluate", tmp_path, lambda: False) == {"is": wanted}
