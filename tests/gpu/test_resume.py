"""PPO on a GPU that is killed in the middle: with `deterministic: true` its weights are those of one that is not."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.config import PPOConfig
from tests.integration.test_ppo import PPO, make_inputs
from tests.ranks import Ranks, after_step, finish, start_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def start(directory: Path, inputs: dict[str, Path]) -> Ranks:
    """PPO as its one process, from a checkpoint if there is one."""
    config = PPOConfig(**PPO, deterministic=True).model_dump(mode="json")
    return start_stage("ppo", directory, {"ppo": config, "seed": 3, "max_answer_tokens": 8}, inputs, 1, "cuda")


@pytest.mark.timeout(300)
def test_a_killed_ppo_ends_with_the_same_weights(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs", hidden_size=128, intermediate_size=256, num_attention_heads=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(whole, inputs))
    ranks = start(parts, inputs)
    after_step(parts, ranks, 3, signal.SIGKILL)
    ranks[0].communicate()
    assert json.loads((parts / "checkpoints" / "latest.json").read_text())["step"] == 2
    finish(start(parts, inputs))
    assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()
    for model in ("model", "ema", "critic"):
        undisturbed, resumed = (load_file(folder / model / "model.safetensors") for folder in (whole, parts))
        assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed), model
