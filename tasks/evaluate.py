"""Which of two policies answers better: both answer the same held-out prompts, the reward model scores the answers.

`evaluate` sets PPO against SFT, and the moving average of PPO's weights against its last, and is absolute: nothing in
it depends on what serves now. `compare` sets the candidate against the present champion; it reads the candidate's
answers from `evaluate` and adds the champion's. Prompts are paired and each batch's randomness is its own, so the same
model gives the same answers in both. A champion may have a tokenizer and chat template of its own: it is asked in its
own words, and judged by the text of its answers.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data_prep.conversation import Message
from data_prep.demo import true_score
from data_prep.splits import EVAL_KEYS
from data_prep.tables import iter_rows, read_table
from data_prep.tokenizer import answer_ids, load_tokenizer, prompt_ids, same_tokens
from data_prep.trained import trained_on
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
    prompts = held_out_prompts(job, config.prompts)
    judge = load_scalar(job.inputs["reward"], tokenizer.pad_token_id).to(job.device, DTYPES[config.precision]).eval()
    if job.stage == "compare":
        ours = [json.loads(line) for line in (job.inputs["evaluate"] / ANSWERS).read_text().splitlines()]
        rows = [{"prompt": row["prompt"], "source": row["source"], **_only(row, "ppo")} for row in ours]
        champion = load_tokenizer(job.inputs["champion"])
        names = {"champion": tokenizer if same_tokens(champion, tokenizer) else champion}
        pair, panel = ("ppo", "champion"), Panel(judge, tokenizer, None)
    else:
        rows = [{"prompt": text_of(tokenizer, p["prompt"]), "source": p["source"]} for p in prompts]
        names = {name: tokenizer for name in ("sft", "ppo", "ema") if name in job.inputs}
        pair, panel = ("ppo", "sft"), Panel(judge, tokenizer, _policy(job.inputs["sft"], job, config))
    for place, (name, own) in enumerate(names.items()):
        contestant = Contestant(name, _policy(job.inputs[name], job, config), own)
        columns = answers(job, config, panel, contestant, prompts, Told(job, place, len(names), len(prompts)))
        rows = [row | column for row, column in zip(rows, columns, strict=True)]
    if job.stage == "compare":
        rows = unseen(rows, prompts, [job.inputs["champion"]], job.inputs["split"])
    write_rows(job.directory / ANSWERS, rows)
    return summary(rows, pair) | (against_last(rows) if "ema" in names else {})


@dataclass(frozen=True)
class Contestant:
    """A policy that answers."""

    name: str
    policy: Policy
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Panel:
    """What answers are measured by: the reward model, in its tokens, and the policy that KL counts from."""

    judge: ScalarModel
    tokenizer: PreTrainedTokenizerBase
    reference: Policy | None


def held_out_prompts(job: Job, count: int) -> list[dict[str, Any]]:
    """The first `count` held-out prompts of PPO's phase (their order is that of the data: shuffled by hash).

    Prompts that a model of this run, or one that it comes from, was trained on are none of them.
    """
    rows: list[dict[str, Any]] = read_table(job.inputs["data"] / "ppo-eval.arrow").to_list()
    ours = [job.inputs[role] for role in ("sft", "reward", "ppo", "candidate") if role in job.inputs]
    return unseen(rows, rows, ours, job.inputs["split"])[:count]


def unseen(
    rows: Sequence[dict[str, Any]], prompts: Sequence[dict[str, Any]], models: Sequence[Path], split: Path
) -> list[dict[str, Any]]:
    """The rows whose prompt belongs to no group that one of the models was trained on. ValueError if there is none.

    Args:
        prompts: of the rows, with their `group`.
        models: folders that keep what their model and its ancestors were trained on.
        split: the stage that holds the prompts out.
    """
    trained = set(trained_on(models).tolist())
    seen = {row["group"] for row in iter_rows(split / EVAL_KEYS) if not trained.isdisjoint(row["keys"])}
    left = [row for row, prompt in zip(rows, prompts, strict=True) if prompt["group"] not in seen]
    if not left:
        raise ValueError(
            "The models that are compared, or those that they come from, were trained on every held-out prompt: "
            "add rows that are new to them, or keep the split ledger of their workspace."
        )
    return left


def answers(
    job: Job,
    config: EvaluateConfig,
    panel: Panel,
    contestant: Contestant,
    prompts: Sequence[dict[str, Any]],
    told: "Told",
) -> list[dict[str, Any]]:
    """A policy's answer to each prompt with what is measured of it, as columns `name`, `name_reward`, ..."""
    columns: list[dict[str, Any]] = []
    tokenizer, ours = contestant.tokenizer, contestant.tokenizer is panel.tokenizer
    for part in chunks(prompts, config.batch_size):
        generator = torch.Generator(job.device).manual_seed(job.config["seed"] * 1_000_003 + len(columns))
        asked = [row["prompt"] if ours else prompt_ids(tokenizer, row["messages"]) for row in part]
        rollout = generate(
            contestant.policy.model,
            left_padded(asked, tokenizer.pad_token_id, job.device),
            job.config["max_answer_tokens"],
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            config.sampling.temperature,
            generator,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
        )
        columns += measure(job, config, panel, contestant, part, rollout)
        told(len(columns))
    return columns


@torch.no_grad()
def measure(
    job: Job,
    config: EvaluateConfig,
    panel: Panel,
    contestant: Contestant,
    part: Sequence[dict[str, Any]],
    rollout: Rollout,
) -> list[dict[str, Any]]:
    """Text, reward, tokens, EOS, KL to the reference and (demo) true score of the answers of one batch."""
    name = contestant.name
    start = rollout.sequences.input_ids.shape[1] - rollout.answer_mask.shape[1]
    answered = [
        tokens[mask].tolist()
        for tokens, mask in zip(rollout.sequences.input_ids[:, start:], rollout.answer_mask, strict=True)
    ]
    texts = [str(contestant.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answered]
    judged = answered
    if contestant.tokenizer is not panel.tokenizer:
        judged = [
            translated(panel.tokenizer, row["messages"], text, bool(ended))
            for row, text, ended in zip(part, texts, rollout.ended, strict=True)
        ]
    whole = right_padded(
        [row["prompt"] + ids for row, ids in zip(part, judged, strict=True)], panel.tokenizer.pad_token_id, job.device
    )
    scores = at(panel.judge(whole), whole.attention_mask.sum(1) - 1) - panel.judge.score_mean
    columns = []
    for row, ids, text, score, ended in zip(part, answered, texts, scores, rollout.ended, strict=True):
        column = {name: text, f"{name}_reward": float(score), f"{name}_tokens": len(ids), f"{name}_ended": bool(ended)}
        if job.config.get("true_score") == "demo":
            column[f"{name}_true_score"] = true_score(row["messages"][-1]["content"], text)
        columns.append(column)
    if panel.reference is not None:
        logprobs = panel.reference(rollout.sequences, start, config.sampling.temperature).logprobs
        kl = torch.where(rollout.answer_mask, rollout.logprobs - logprobs, 0.0).sum(1)
        columns = [column | {f"{name}_kl": float(value)} for column, value in zip(columns, kl, strict=True)]
    return columns


def translated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, ended: bool) -> list[int]:
    """An answer's text in other tokens; EOS stands only where the answer was ended, as in the policy's own tokens."""
    ids = answer_ids(tokenizer, messages, Message(role="assistant", content=text))
    return ids if ended else ids[:-1]


def summary(rows: Sequence[dict[str, Any]], pair: tuple[str, str]) -> dict[str, Any]:
    """Win rate of the first over the second (ties count half) with its 95 % interval, and means per model."""
    first, second = pair
    rate, interval = win_rate(rows, first, second)
    result: dict[str, Any] = {"prompts": len(rows), "win_rate": rate, "win_rate_interval": interval}
    return result | measured(rows, first) | measured(rows, second)


def against_last(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the moving average of the policy's weights does against its last weights."""
    rate, interval = win_rate(rows, "ema", "ppo")
    return {"ema_win_rate": rate, "ema_win_rate_interval": interval, **measured(rows, "ema")}


def win_rate(rows: Sequence[dict[str, Any]], first: str, second: str) -> tuple[float, float]:
    """The share of prompts that the first wins, ties as half, and the half-width of its 95 % interval (normal)."""
    wins = [_win(row[f"{first}_reward"], row[f"{second}_reward"]) for row in rows]
    rate = sum(wins) / len(wins)
    variance = sum((win - rate) ** 2 for win in wins) / len(wins)
    return rate, 1.96 * math.sqrt(variance / len(wins))


def measured(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Means over a model's answers."""
    result = {}
    for measure in ("reward", "true_score", "tokens", "ended", "kl"):
        key = f"{name}_{measure}"
        if key in rows[0]:
            values = torch.tensor([float(row[key]) for row in rows], dtype=torch.float64)
            result[f"{name}_{'eos_rate' if measure == 'ended' else measure}"] = float(values.mean())
            if measure in ("reward", "true_score"):
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
