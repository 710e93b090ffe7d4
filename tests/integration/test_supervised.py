"""SFT and the reward model in the worker: killed or stopped, they end with the weights of the undisturbed run."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from data_prep.splits import EVAL_KEYS, KEYS_SCHEMA
from data_prep.tables import table_writer, write_table
from data_prep.tokenise import SCHEMAS
from tasks.base import train_tokenizer
from tasks.config import RewardConfig, SFTConfig
from tests.ranks import Ranks, after_step, finish, start_stage
from tests.tiny import tiny_llama_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS = ["tell me of the red apple", "the apple is red and the pear is green", "a pear, an apple, a plum"]
CONFIG: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch_tokens": 64,
    "max_steps": 6,
    "checkpoint_every": 2,
    "eval_every": 2,
    "keep_best": True,
    "optimizer": {"learning_rate": 0.02},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model and tables, tiny."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_for(tokenizer, num_hidden_layers=3)).save_pretrained(folder / "base" / "model")
    tokenizer.save_pretrained(folder / "base" / "model")
    (folder / "data").mkdir()
    draw = torch.Generator().manual_seed(1)

    def ids(most: int) -> list[int]:
        return torch.randint(2, 250, (int(torch.randint(2, most, (), generator=draw)),), generator=draw).tolist()

    for kind in ("sft", "reward"):
        for part, rows in (("train", 48), ("eval", 9)):
            with table_writer(folder / "data" / f"{kind}-{part}.arrow", SCHEMAS[kind]) as writer:
                for _ in range(rows):
                    answers = {"answer": ids(12)} if kind == "sft" else {"chosen": ids(12), "rejected": ids(12)}
                    row = {"prompt": ids(9), **answers, "others": [], "source": "mine", "group": part, "weight": 1.0}
                    writer.append({name: row[name] for name in SCHEMAS[kind].names if name in row})
    (folder / "split").mkdir()
    write_table([{"group": "eval", "keys": [9]}], folder / "split" / EVAL_KEYS, KEYS_SCHEMA)
    for kind in ("sft", "reward"):
        np.save(folder / "split" / f"{kind}-keys.npy", np.arange(5, dtype=np.uint64))
    return {name: folder / name for name in ("data", "split", "base")}


def start(kind: str, directory: Path, inputs: dict[str, Path], processes: int, zero: int, **changes: Any) -> Ranks:
    """The ranks of a stage in `directory`, which may hold a checkpoint."""
    section = {"sft": SFTConfig, "reward": RewardConfig}[kind]
    more = {"layers": 2, "frozen_layers": 1, "head_learning_rate": 0.05} if kind == "reward" else {}
    config = section(**CONFIG | more | changes, engine={"precision": "fp32", "zero_stage": zero})
    return start_stage(kind, directory, {kind: config.model_dump(mode="json"), "seed": 3}, inputs, processes)


@pytest.mark.parametrize(
    ("kind", "processes", "zero"),
    [("sft", 1, 0), ("reward", 2, 3)],
    ids=["SFT, one process", "reward model of two layers of three, one of them frozen, two processes, ZeRO-3"],
)
def test_a_killed_and_a_stopped_run_end_with_the_same_weights(
    tmp_path: Path, inputs: dict[str, Path], kind: str, processes: int, zero: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(kind, whole, inputs, processes, zero))
    ranks = start(kind, parts, inputs, processes, zero)
    after_step(parts, ranks, 3, signal.SIGKILL)
    for rank in ranks:
        rank.communicate()
    assert json.loads((parts / "checkpoints" / "latest.json").read_text())["step"] == 2
    ranks = start(kind, parts, inputs, processes, zero)
    after_step(parts, ranks, 4, signal.SIGTERM)
    finish(ranks, code=75)
    outcome = json.loads((parts / "records" / "outcome.json").read_text())
    assert outcome["kind"] == "stopped"
    assert outcome["resumes_at"] in (4, 5)
    finish(start(kind, parts, inputs, processes, zero))
    reports = [json.loads((folder / "records" / "report.json").read_text()) for folder in (whole, parts)]
    assert reports[0] == reports[1]
    assert reports[0]["steps"] == 6
    undisturbed, resumed = (load_file(folder / "model" / "model.safetensors") for folder in (whole, parts))
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert any("layers.2." in name for name in undisturbed) == (kind == "sft")
    base = load_file(inputs["base"] / "model" / "model.safetensors")
    kept = [name for name in base if name in undisturbed and torch.equal(base[name], undisturbed[name])]
    assert kept == [name for name in base if kind == "reward" and ("layers.0." in name or "embed_tokens" in name)]


def test_another_number_of_ranks_is_refused_with_the_reason(tmp_path: Path, inputs: dict[str, Path]) -> None:
    ranks = start("sft", tmp_path, inputs, 1, 2)
    after_step(tmp_path, ranks, 1, signal.SIGTERM)
    finish(ranks, code=75)
    (tmp_path / "records" / "outcome.json").unlink()
    finish(start("sft", tmp_path, inputs, 2, 2), code=2)
    outcome = json.loads((tmp_path / "records" / "outcome.json").read_text())
    assert "was written by 1 processes, this run has 2" in outcome["message"]


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_held_out_rows_that_two_ranks_cannot_share_count_once(
    tmp_path: Path, inputs: dict[str, Path], kind: str
) -> None:
    reports = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        finish(start(kind, folder, inputs, processes, 3, max_steps=1, keep_best=False, micro_batch_tokens=1))
        reports.append(json.loads((folder / "records" / "report.json").read_text()))
    assert [report["eval_rows" if kind == "sft" else "eval_pairs"] for report in reports] == [9, 9]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-4)
