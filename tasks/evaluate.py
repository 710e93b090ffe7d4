"""Which of two policies answers better: both answer the same held-out prompts, the reward model scores the answers.

`evaluate` sets PPO against SFT and is absolute: nothing in it depends on what serves now. `compare` sets the candidate
against the present champion; it reads the candidate's answers from `evaluate` and adds the champion's. Prompts are
paired and each prompt's randomness is its own, so the same model gives the same answers in both.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data_prep.demo import true_score
from data_prep.tables import read_table
from data_prep.tokenizer import load_tokenizer
from tasks.config import EvaluateConfig
from tasks.training.batches import at, chunks, left_padded, right_padded
from tasks.training.job import Job
from tasks.training.models import DTYPES, Policy, ScalarModel, load_policy, load_scalar
from tasks.training.rollout import generate
from tasks.training.types import Rollout

ANSWERS = "answers.jsonl"


def run(job: Job) -> dict[str, Any]:
    """Answer, score, compare; writes answers.jsonl. Returns win rate, mean rewards, KL, lengths, EOS rates."""
    config = EvaluateConfig.model_validate(job.config["evaluate"])
    tokenizer = load_tokenizer(job.inputs["tokenizer"])
    prompts = held_out_prompts(job.inputs["data"], config.prompts)
    judge = load_scalar(job.inputs["reward"], tokenizer.pad_token_id).to(job.device, DTYPES[config.precision]).eval()
    if job.stage == "compare":
        ours = [json.loads(line) for line in (job.inputs["evaluate"] / ANSWERS).read_text().splitlines()]
        rows = [{"prompt": row["prompt"], "source": row["source"], **_only(row, "ppo")} for row in ours]
        names = {"champion": job.inputs["champion"]}
        pair = ("ppo", "champion")
    else:
        rows = [{"prompt": text_of(tokenizer, p["prompt"]), "source": p["source"]} for p in prompts]
        names = {"sft": job.inputs["sft"], "ppo": job.inputs["ppo"]}
        pair = ("ppo", "sft")
    reference = _policy(job.inputs["sft"], job, config) if "ppo" in names else None
    for place, (name, folder) in enumerate(names.items()):
        policy = _policy(folder, job, config)
        told = Told(job, place, len(names), len(prompts))
        columns = answers(job, config, tokenizer, policy, judge, reference, prompts, name, told)
        rows = [row | column for row, column in zip(rows, columns, strict=True)]
    write_rows(job.directory / ANSWERS, rows)
    return summary(rows, pair)


def held_out_prompts(data: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` held-out prompts of PPO's phase (their order is that of the data: shuffled by hash)."""
    table = read_table(data / "ppo-eval.arrow")
    rows: list[dict[str, Any]] = table.select(range(min(count, len(table)))).to_list()
    return rows


def answers(
    job: Job,
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    judge: ScalarModel,
    reference: Policy | None,
    prompts: Sequence[dict[str, Any]],
    name: str,
    told: "Told",
) -> list[dict[str, Any]]:
    """A policy's answer to each prompt with what is measured of it, as columns `name`, `name_reward`, ..."""
    columns: list[dict[str, Any]] = []
    for part in chunks(prompts, config.batch_size):
        generator = torch.Generator(job.device).manual_seed(job.config["seed"] * 1_000_003 + len(columns))
        rollout = generate(
            policy.model,
            left_padded([row["prompt"] for row in part], tokenizer.pad_token_id, job.device),
            job.config["max_answer_tokens"],
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            config.sampling.temperature,
            generator,
        )
        columns += measure(job, config, tokenizer, judge, reference, part, rollout, name)
        told(len(columns))
    return columns


@torch.no_grad()
def measure(
    job: Job,
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    judge: ScalarModel,
    reference: Policy | None,
    part: Sequence[dict[str, Any]],
    rollout: Rollout,
    name: str,
) -> list[dict[str, Any]]:
    """Text, reward, tokens, EOS, KL to the reference and (demo) true score of the answers of one batch."""
    start = rollout.sequences.input_ids.shape[1] - rollout.answer_mask.shape[1]
    answer_ids = [
        tokens[mask].tolist()
        for tokens, mask in zip(rollout.sequences.input_ids[:, start:], rollout.answer_mask, strict=True)
    ]
    whole = right_padded(
        [row["prompt"] + ids for row, ids in zip(part, answer_ids, strict=True)], tokenizer.pad_token_id, job.device
    )
    scores = at(judge(whole), whole.attention_mask.sum(1) - 1) - judge.score_mean
    columns = []
    for row, ids, score, ended in zip(part, answer_ids, scores, rollout.ended, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        column = {name: text, f"{name}_reward": float(score), f"{name}_tokens": len(ids), f"{name}_ended": bool(ended)}
        if job.config.get("true_score") == "demo":
            column[f"{name}_true_score"] = true_score(text_of(tokenizer, row["prompt"]), text)
        columns.append(column)
    if reference is not None:
        logprobs = reference(rollout.sequences, start, config.sampling.temperature).logprobs
        kl = torch.where(rollout.answer_mask, rollout.logprobs - logprobs, 0.0).sum(1)
        columns = [column | {f"{name}_kl": float(value)} for column, value in zip(columns, kl, strict=True)]
    return columns


def summary(rows: Sequence[dict[str, Any]], pair: tuple[str, str]) -> dict[str, Any]:
    """Win rate of the first over the second (ties count half) with its 95 % interval, and means per model."""
    first, second = pair
    wins = [_win(row[f"{first}_reward"], row[f"{second}_reward"]) for row in rows]
    rate = sum(wins) / len(wins)
    variance = sum((win - rate) ** 2 for win in wins) / len(wins)
    result: dict[str, Any] = {
        "prompts": len(rows),
        "win_rate": rate,
        "win_rate_interval": 1.96 * math.sqrt(variance / len(wins)),
    }
    for name in pair:
        for measured in ("reward", "true_score", "tokens", "ended", "kl"):
            key = f"{name}_{measured}"
            if key in rows[0]:
                values = torch.tensor([float(row[key]) for row in rows], dtype=torch.float64)
                result[f"{name}_{'eos_rate' if measured == 'ended' else measured}"] = float(values.mean())
                if measured in ("reward", "true_score"):
                    result[f"{key}_std"] = float(values.std())
    return result


class Told:
    """Progress over the prompts of all models that answer."""

    def __init__(self, job: Job, models_before: int, models: int, prompts: int) -> None:
        self.job, self.before, self.total = job, models_before * prompts, models * prompts

    def __call__(self, answered: int) -> None:
        self.job.progress(self.before + answered, self.total, {})


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What a person reads of a prompt's token ids."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _policy(folder: Path, job: Job, config: EvaluateConfig) -> Policy:
    policy: nn.Module = load_policy(folder).to(job.device, DTYPES[config.precision]).eval()
    assert isinstance(policy, Policy)
    return policy


def _only(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key == name or key.startswith(f"{name}_")}


def _win(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)
