"""PPO in the worker: one that is killed in the middle ends with the same weights as one that is not, bit for bit."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from data_prep.conversation import Message
from data_prep.tables import table_writer
from data_prep.tokenise import SCHEMAS
from data_prep.tokenizer import prompt_ids
from tasks.base import train_tokenizer
from tasks.config import PPOConfig
from tests.integration.programs.ppo_steps import differences
from tests.ranks import PROGRAMS, Ranks, after_step, finish, start_ranks, start_stage
from tests.tiny import tiny_llama_for

pytestmark = pytest.mark.slow

TEXTS = ["tell me of the red apple", "the apple is red and the pear is green", "a pear, an apple, a plum"]
PPO = {
    "steps": 6,
    "generation_batches": 2,
    "rollout_batch_size": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "epochs": 2,
    "kl_target": 2.0,
    "kl_horizon": 50,
    "normalise_rewards": True,
    "ema_decay": 0.8,
    "checkpoint_every": 2,
    "policy_optimizer": {"learning_rate": 0.01},
    "critic_optimizer": {"learning_rate": 0.01},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def make_inputs(folder: Path, **shape: int) -> dict[str, Path]:
    """SFT, reward model and prompts, tiny."""
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    config = tiny_llama_for(tokenizer, num_hidden_layers=2, num_labels=1, initializer_range=0.2, **shape)
    torch.manual_seed(0)
    for name, model_class in (("sft", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        model_class(config).save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
    (folder / "data").mkdir()
    with table_writer(folder / "data" / "ppo-train.arrow", SCHEMAS["ppo"]) as writer:
        for number in range(12):
            messages = [Message(role="user", content=f"{TEXTS[number % 3]} {number}")]
            writer.append({"prompt": prompt_ids(tokenizer, messages), "messages": messages, "source": "mine"})
    (folder / "split").mkdir()
    np.save(folder / "split" / "ppo-keys.npy", np.arange(5, dtype=np.uint64))
    return {name: folder / name for name in ("data", "split", "sft", "reward")}


def start(directory: Path, inputs: dict[str, Path], processes: int, stage: int, rollout: str = "auto") -> Ranks:
    """The ranks of a PPO stage in `directory`, which may hold a checkpoint."""
    engines = {f"{name}_engine": {"precision": "fp32", "zero_stage": stage} for name in ("policy", "critic")}
    frozen = {f"{name}_engine": {"precision": "fp32", "zero_stage": stage} for name in ("reference", "reward")}
    config = {
        "ppo": PPOConfig(**PPO, **engines, **frozen, rollout={"engine": rollout}).model_dump(mode="json"),
        "seed": 3,
        "max_answer_tokens": 8,
    }
    return start_stage("ppo", directory, config, inputs, processes)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("processes", "stage"), [(1, 0), (2, 3)], ids=["one process", "two processes, ZeRO-3"])
def test_a_killed_ppo_ends_with_the_same_weights(
    tmp_path: Path, inputs: dict[str, Path], processes: int, stage: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(whole, inputs, processes, stage))
    ranks = start(parts, inputs, processes, stage)
    after_step(parts, ranks, 3, signal.SIGKILL)
    for rank in ranks:
        rank.communicate()
    latest = json.loads((parts / "checkpoints" / "latest.json").read_text())
    assert latest["step"] == 2
    finish(start(parts, inputs, processes, stage))
    reports = [json.loads((folder / "records" / "report.json").read_text()) for folder in (whole, parts)]
    for name in ("reward", "kl", "entropy", "eos_rate"):
        assert reports[0][name] == reports[1][name]
    assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()
    for model in ("model", "ema", "critic"):
        undisturbed, resumed = (load_file(folder / model / "model.safetensors") for folder in (whole, parts))
        assert undisturbed.keys() == resumed.keys()
        assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    policy, ema = (load_file(whole / model / "model.safetensors") for model in ("model", "ema"))
    start_weights = load_file(inputs["sft"] / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(policy[name], start_weights[name])
    distances = [float((weights[name] - start_weights[name]).norm()) for weights in (ema, policy)]
    assert 0 < distances[0] < distances[1]


@pytest.mark.timeout(600)
def test_zero_3_takes_the_steps_of_no_zero(tmp_path: Path, inputs: dict[str, Path]) -> None:
    histories = []
    for stage in (0, 3):
        directory = tmp_path / str(stage)
        finish(start(directory, inputs, 2, stage, rollout="plain"))  # slots draw other answers, and ZeRO-3 has none
        rows = (directory / "records" / "metrics.jsonl").read_text().splitlines()
        histories.append([json.loads(row) for row in rows])
    for whole, partitioned in zip(*histories, strict=True):
        for name in ("ppo/reward", "ppo/kl", "ppo/policy_loss", "ppo/value_loss", "ppo/critic_grad_norm"):
            assert whole[name] == pytest.approx(partitioned[name], rel=2e-2, abs=1e-3), name


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "epochs"), [(0, 1), (2, 2), (3, 2)], ids=str)
def test_two_ranks_with_half_of_the_rows_have_the_numbers_of_one(tmp_path: Path, stage: int, epochs: int) -> None:
    """Advantages after whitening, the adapted KL coefficient, losses and gradient norms, for given answers."""
    results = []
    for ranks in (1, 2):
        finish(start_ranks(f"{PROGRAMS}.ppo_steps", [tmp_path, stage, "--epochs", epochs], ranks))
        results.append(json.loads((tmp_path / "result.json").read_text()))
    one, two = results
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert len({pool["ppo/kl_coef"] for pool in one["pools"]}) == 3
    gaps = differences(one, two)
    assert max(gaps.values()) < 2e-3, gaps
    assert gaps["advantages"] < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3], ids=["whole", "gathered"])
def test_slots_of_each_rank_answer_as_the_plain_loop(tmp_path: Path, stage: int) -> None:
    finish(start_ranks(f"{PROGRAMS}.rollout_ranks", [tmp_path, stage], 2))
    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["rank"] for row in found] == [0, 0, 0, 1, 1, 1]
    assert all(row["same"] for row in found), found
    assert max(row["gap"] for row in found) < 1e-4, found
