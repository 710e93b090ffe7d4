"""Every bench of training runs in small, so that none has rotted when a GPU is at hand."""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.tables import PAIR_SCHEMA, write_table
from data_prep.tokenise import SCHEMAS
from data_prep.tokenizer import prompt_ids
from tasks.base import train_tokenizer
from tasks.config import RewardConfig
from tasks.shapes import GIB
from tests.bench import dry_run, memory, ppo, reward_folds, train
from tests.bench.process import printed_apart

TINY = argparse.Namespace(tiny=True, hub=None, profile=False, tokenizer="")


@pytest.mark.parametrize("case", ["rollout-b64", "fixed-1.3b-b64-ptx-ema", "eos-1.3b-b64"])
def test_ppo(one_rank: torch.device, case: str) -> None:
    found = ppo.CASES[case](ppo.TINY, one_rank)
    assert all(value > 0 for name, value in found.items() if name not in ("peak_gib", "logprob_gap"))
    assert found.get("logprob_gap", 0.0) < 1e-4


@pytest.mark.parametrize("side", ["plain", "ours"])
@pytest.mark.parametrize("name", ["sft-1.7b-2048", "reward-350m"])
def test_train(one_rank: torch.device, name: str, side: str) -> None:
    found = train.run_side(name, train.small(train.CASES[name]), side, TINY)
    assert found["tokens_per_s"] > 0
    assert found["mfu"] > 0


@pytest.mark.parametrize("side", ["one", "two"])
def test_train_on_two_gpus_runs_on_one_rank(one_rank: torch.device, side: str) -> None:
    case = train.small(train.CASES["zero3-2gpu"])
    found = train.run_side("zero3-2gpu", case, side, TINY)
    assert len(found["curve"]) == case.warmup + case.steps


def test_memory_runs_with_adapters(one_rank: torch.device) -> None:
    assert memory.measured(memory.CASES["32gb"], tiny=True)["samples_per_s"] > 0


@pytest.mark.parametrize(("name", "least"), [("32gb", 6.6), ("40gb", 12.8), ("48gb", 12.8), ("80gb", 29.9)])
def test_the_largest_policies_fit_by_prediction(name: str, least: float) -> None:
    case = memory.CASES[name]
    assert case.params_b > least
    assert memory.predicted(memory.size_of(case, tiny=False)).needed < 0.98 * case.gib * GIB
    larger = replace(case, policy=ppo.opt(7168, 96, 56))
    assert memory.predicted(memory.size_of(larger, tiny=False)).needed > case.gib * GIB


@pytest.mark.slow
@pytest.mark.parametrize("config", ["opt-1.3b", "llama-7b", "smollm2-135m"])
def test_a_dry_run_takes_every_stage(tmp_path: Path, config: str) -> None:
    path = Path(__file__).parents[3] / "infra" / "runs" / f"{config}.yaml"
    with_weights = {}
    for _, stage, _, predicted, _ in dry_run.dry_run(path, [], tmp_path, tiny=True):
        assert predicted > 0
        with_weights[stage] = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*.safetensors")}
    assert list(with_weights) == ["sft", "reward", "gold", "ppo"]
    assert with_weights["ppo"] == {"sft", "reward", "ppo"}  # what PPO reads and writes, and no model beside that


def test_folds_keep_what_is_about_one_prompt_together(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["one two three four five six seven eight nine ten"] * 5), 300)
    tokenizer.save_pretrained(tmp_path / "base" / "model")
    prompts = [[{"role": "user", "content": f"prompt {number}"}] for number in range(40)]
    answer = [{"role": "assistant", "content": "so"}]
    pairs = [
        {
            "prompt": prompt,
            "chosen": answer,
            "rejected": answer,
            "source": "s",
            "group": f"g{place // 4}",
            "weight": 1.0,
        }
        for place, prompt in enumerate(prompts)
    ]
    write_table(pairs, tmp_path / "reward-train.arrow", PAIR_SCHEMA)
    ids = [{**pair, "prompt": prompt_ids(tokenizer, pair["prompt"]), "chosen": [5], "rejected": [6]} for pair in pairs]
    (tmp_path / "data").mkdir()
    write_table(ids[1:], tmp_path / "data" / "reward-train.arrow", SCHEMAS["reward"])  # one was too long
    inputs = {"base": str(tmp_path / "base"), "data": str(tmp_path / "data"), "split": str(tmp_path)}
    dealt = reward_folds.folds_of({"inputs": inputs}, 3)
    assert sum(map(len, dealt)) == 39
    group_of = {tuple(row["prompt"]): row["group"] for row in ids}
    per_fold = [{group_of[tuple(row["prompt"])] for row in fold} for fold in dealt]
    assert sum(map(len, per_fold)) == len(set.union(*per_fold)) == 10


def test_a_setting_lies_over_the_section_and_is_checked() -> None:
    stage = {"reward": RewardConfig().model_dump(mode="json", exclude={"seed"}), "seed": 3}
    assert reward_folds.with_setting(stage, "") == stage
    found = reward_folds.with_setting(stage, "frozen_layers=3 optimizer.betas=[0.9,0.99] seed=7")
    assert (found["seed"], found["reward"]["frozen_layers"], found["reward"]["optimizer"]["betas"]) == (
        7,
        3,
        [0.9, 0.99],
    )
    for wrong, said in {
        "frozen=3": "did you mean frozen_layers",
        "optimiser.eps=1": "did you mean optimizer",
        "eval_every=1 keep_best=true": "choose by the fold that is judged",
    }.items():
        with pytest.raises(ValueError, match=said):
            reward_folds.with_setting(stage, wrong)


def test_a_bench_that_hangs_is_ended_with_all_that_it_started(capfd: pytest.CaptureFixture[str]) -> None:
    # Its child holds the pipe open, as a worker that compiles kernels does.
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    assert printed_apart("case", ["-c", f"{program}; time.sleep(60)"], 1) is None
    assert time.monotonic() - started < 20
    assert "case: not done within 1 s" in capfd.readouterr().out
    assert printed_apart("case", ["-c", "print(1); print(2)"], 20) == ["1", "2"]
    assert printed_apart("case", ["-c", "raise SystemExit('no memory')"], 20) is None
    assert "no memory" in capfd.readouterr().out


def test_ranks_are_started_together_and_ended_when_one_fails(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])"
    assert printed_apart("case", ["-c", program], 60, ranks=2) == ["0 2"]
    started = time.monotonic()
    program = "import os, time; os.environ['RANK'] == '1' and exit('out of luck'); time.sleep(60)"
    assert printed_apart("case", ["-c", program], 60, ranks=2) is None
    assert time.monotonic() - started < 30
    assert "case, rank 1, failed:\nout of luck" in capfd.readouterr().out
