"""Which of two policies answers better: both answer the same held-out prompts, reward models score the answers.

The scores are those of the reward model that PPO was trained on and, where the run has one, of the gold reward model,
which PPO never saw; `tasks.compared` says what they come to.

`evaluate` sets PPO against SFT, and the moving average of PPO's weights against its last, and is absolute: nothing in
it depends on what serves now. `compare` sets the candidate against the present champion; it reads the candidate's
answers from `evaluate` and adds the champion's: from the champion's own `evaluate` where that had the same prompts and
scorers, else it answers anew. Prompts are paired and an answer's randomness is that of its place, so the same model
gives the same answers in all of them. A champion may have a tokenizer and chat template of its own: it is asked in its
own words, and judged by the text of its answers.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data_prep.conversation import Message
from data_prep.demo import true_score
from data_prep.tables import read_table
from data_prep.tokenizer import answer_ids, load_tokenizer, prompt_ids, same_tokens
from data_prep.trained import unseen
from tasks import untrusted
from tasks.compared import PROXY, SCORERS, comparison, measured
from tasks.config import EvaluateConfig
from tasks.diversity import repetition
from tasks.json_lines import read_rows, write_rows
from tasks.training import sampling
from tasks.training.batches import at, chunks, right_padded
from tasks.training.job import Job
from tasks.training.models import DTYPES, Policy, ScalarModel, load_policy, load_scalar
from tasks.training.samples import SAMPLES
from tasks.training.sampling import Drawing
from tasks.training.types import Rollout

LOG = logging.getLogger(__name__)
ANSWERS = "answers.jsonl"
POOLS = "pools.jsonl"
"""Pools of PPO, a row each: the mean KL of its answers and their mean score by each scorer."""
TEXTS = "texts.jsonl"
"""The loss of each chunk of unsupervised text, a column per model; empty where the run has none."""


def run(job: Job) -> dict[str, Any]:
    """Answer, score, compare; writes answers.jsonl. Returns the figures of `tasks.compared`."""
    return _compare(job) if job.stage == "compare" else _evaluate(job)


def _evaluate(job: Job) -> dict[str, Any]:
    """PPO against SFT, and the moving average; writes texts.jsonl and pools.jsonl too."""
    config, tokenizer, prompts = _asked(job)
    panel = Panel(_scorers(job, config, tokenizer), tokenizer, _policy("sft", job, config))
    rows: list[dict[str, Any]] = [{"prompt": text_of(tokenizer, p["prompt"]), "source": p["source"]} for p in prompts]
    chunks_of_text = held_out_text(job, config.text_chunks)
    texts: list[dict[str, float]] = [{} for _ in chunks_of_text]
    names = [name for name in ("sft", "ppo", "ema") if name in job.inputs]
    for place, name in enumerate(names):
        contestant = Contestant(name, _policy(name, job, config), tokenizer)
        columns = answers(job, config, panel, contestant, prompts, Told(job, place, len(names), len(prompts)))
        rows = [row | column for row, column in zip(rows, columns, strict=True)]
        losses = text_losses(contestant.policy, chunks_of_text, config.batch_size, job.device)
        texts = [row | {f"{name}_loss": loss} for row, loss in zip(texts, losses, strict=True)]
    write_rows(job.directory / ANSWERS, rows)
    write_rows(job.directory / TEXTS, texts)
    write_rows(job.directory / POOLS, along_ppo(job, config, panel))
    LOG.info("all is scored")
    return _against(rows, "sft") | (against_last(rows) if "ema" in names else {}) | perplexities(texts)


def _compare(job: Job) -> dict[str, Any]:
    """The candidate against the champion."""
    config, tokenizer, prompts = _asked(job)
    ours = read_rows(job.inputs["evaluate"] / ANSWERS)
    rows = [{"prompt": row["prompt"], "source": row["source"], **_columns(row, "ppo")} for row in ours]
    columns = as_evaluated(job, rows)
    if columns is None:
        own = load_tokenizer(job.inputs["champion"], _trusts(job, "champion"))
        own = tokenizer if same_tokens(own, tokenizer) else own
        contestant = Contestant("champion", _policy("champion", job, config), own)
        panel = Panel(_scorers(job, config, tokenizer), tokenizer, None)
        columns = answers(job, config, panel, contestant, prompts, Told(job, 0, 1, len(prompts)))
    rows = [row | column for row, column in zip(rows, columns, strict=True)]
    asked = unseen([prompt["group"] for prompt in prompts], [job.inputs["champion"]], job.inputs["split"])
    rows = [rows[place] for place in asked]
    write_rows(job.directory / ANSWERS, rows)
    return _against(rows, "champion")


def as_evaluated(job: Job, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The columns that the champion has in its own evaluation; None where there is none, or its prompts are not those
    of `rows`: a model is not asked what its ancestors were trained on. Data and scorers are the same (`tasks.dag`)."""
    theirs = read_rows(job.inputs["answered"] / ANSWERS) if "answered" in job.inputs else []
    if [row["prompt"] for row in rows] != [row["prompt"] for row in theirs]:
        return None
    LOG.info("the champion's answers are those of its own evaluation")
    # Its KL is left out: where it answers anew, its SFT model is not there to count from.
    columns = [_columns(row, "ppo") for row in theirs]
    return [{f"champion{key.removeprefix('ppo')}": row[key] for key in row if key != "ppo_kl"} for row in columns]


@dataclass(frozen=True)
class Contestant:
    """A policy that answers."""

    name: str
    policy: Policy
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Panel:
    """What answers are measured by: the reward models, in their tokens, and the policy that KL counts from."""

    scorers: Mapping[str, ScalarModel]
    tokenizer: PreTrainedTokenizerBase
    reference: Policy | None


def _asked(job: Job) -> tuple[EvaluateConfig, PreTrainedTokenizerBase, list[dict[str, Any]]]:
    """The stage's config, the tokenizer of this run's models, the prompts."""
    config = EvaluateConfig.model_validate(job.config["evaluate"])
    tokenizer = load_tokenizer(job.inputs["tokenizer"], job.trusts("base") or job.trusts("sft"))
    return config, tokenizer, held_out_prompts(job, config.prompts)


def _scorers(job: Job, config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, ScalarModel]:
    return {
        role: load_scalar(job.inputs[role], tokenizer.pad_token_id, trusted=job.trusts(role))
        .to(job.device, DTYPES[config.precision])
        .eval()
        for role in SCORERS
        if role in job.inputs
    }


def held_out_prompts(job: Job, count: int) -> list[dict[str, Any]]:
    """The first `count` held-out prompts in the order of the data, in which those of PPO's phase come before others.

    Prompts that a model of this run, or one that it comes from, was trained on are none of them.
    """
    table = read_table(job.inputs["data"] / "ppo-eval.arrow")
    ours = [job.inputs[role] for role in ("sft", *SCORERS, "ppo", "candidate") if role in job.inputs]
    rows: list[dict[str, Any]] = table.select(unseen(table["group"], ours, job.inputs["split"])[:count]).to_list()
    return rows


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
    asked = [row["prompt"] if ours else prompt_ids(tokenizer, row["messages"]) for row in prompts]
    how = Drawing(
        limit=job.config["max_answer_tokens"],
        temperature=config.sampling.temperature,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        seed=job.config["seed"] * 1_000_003,
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
    )
    drawn = sampling.answers(contestant.policy.model, asked, how, config.batch_size, job.device)
    for part, rollout in zip(chunks(prompts, config.batch_size), drawn, strict=True):
        columns += measure(job, config, panel, contestant, part, rollout)
        told(len(columns))
    LOG.info("the answers of %s are scored", contestant.name)
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
    """Text, scores, tokens, EOS, repetition, KL to the reference and (demo) true score of the answers of one batch."""
    name = contestant.name
    answered = rollout.answers()
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
    last = whole.attention_mask.sum(1) - 1
    scores = {role: at(model(whole), last).tolist() for role, model in panel.scorers.items()}
    columns = []
    for place, (row, ids, text, ended) in enumerate(zip(part, answered, texts, rollout.ended, strict=True)):
        column = {name: text} | {f"{name}_{role}": of_role[place] for role, of_role in scores.items()}
        column |= {f"{name}_tokens": len(ids), f"{name}_ended": bool(ended), f"{name}_repetition": repetition(text)}
        if job.config.get("true_score") == "demo":
            column[f"{name}_true_score"] = true_score(row["messages"][-1]["content"], text)
        columns.append(column)
    if panel.reference is not None:
        logprobs = panel.reference(rollout.sequences, rollout.start, config.sampling.temperature).logprobs
        kl = torch.where(rollout.answer_mask, rollout.logprobs - logprobs, 0.0).sum(1)
        columns = [column | {f"{name}_kl": float(value)} for column, value in zip(columns, kl, strict=True)]
    return columns


def translated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, ended: bool) -> list[int]:
    """An answer's text in other tokens; EOS stands only where the answer was ended, as in the policy's own tokens."""
    ids = answer_ids(tokenizer, messages, Message(role="assistant", content=text))
    return ids if ended else ids[:-1]


def _against(rows: Sequence[dict[str, Any]], rival: str) -> dict[str, Any]:
    """How PPO's policy does against a rival."""
    return comparison(rows, "ppo", rival) | measured(rows, "ppo") | measured(rows, rival)


def against_last(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the moving average of the policy's weights does against its last weights."""
    found = {f"ema_{name}": value for name, value in comparison(rows, "ema", "ppo").items() if name != "prompts"}
    return found | measured(rows, "ema")


@torch.no_grad()
def along_ppo(job: Job, config: EvaluateConfig, panel: Panel) -> list[dict[str, float]]:
    """What the scorers say of the answers that PPO kept on its way, pool by pool; the axis of its course is the KL.

    The reward model's scores are those that PPO itself went by; what it was not to see scores the answers now.
    """
    path = job.inputs["ppo"].parent / SAMPLES
    kept = read_rows(path) if path.is_file() else []
    later = {role: model for role, model in panel.scorers.items() if role != PROXY}
    for part in chunks(kept, config.batch_size):
        whole = right_padded([row["prompt"] + row["answer"] for row in part], panel.tokenizer.pad_token_id, job.device)
        last = whole.attention_mask.sum(1) - 1
        for role, model in later.items():
            for row, score in zip(part, at(model(whole), last).tolist(), strict=True):
                row[role] = score
    pools: dict[int, list[dict[str, Any]]] = {}
    for row in kept:
        pools.setdefault(row["step"], []).append(row)
    means = ("kl", PROXY, *later)
    return [
        {"step": step, **{name: sum(row[name] for row in rows) / len(rows) for name in means}}
        for step, rows in pools.items()
    ]


def held_out_text(job: Job, count: int) -> list[list[int]]:
    """The first `count` chunks of the unsupervised text that PPO did not learn; none where the run has no such text."""
    if "text" not in job.inputs:
        return []
    table = read_table(job.inputs["text"] / "ptx-eval.arrow")
    return [row["tokens"] for row in table.select(range(min(count, len(table)))).to_list()]


@torch.no_grad()
def text_losses(policy: Policy, text: Sequence[list[int]], batch_size: int, device: torch.device) -> list[float]:
    """The mean loss of each chunk, in nats per token that has one before it."""
    losses: list[float] = []
    for part in chunks(text, batch_size):
        batch = right_padded(part, 0, device)
        losses += (-policy(batch, 1).logprobs.mean(1)).tolist()
    return losses


def perplexities(texts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`name_perplexity` of each model on all chunks together, which are of one length; nothing without any."""
    columns = list(texts[0]) if texts else []
    means = {column: sum(row[column] for row in texts) / len(texts) for column in columns}
    return {f"{column.removesuffix('_loss')}_perplexity": math.exp(mean) for column, mean in means.items()}


class Told:
    """Progress over the prompts of all models that answer."""

    def __init__(self, job: Job, models_before: int, models: int, prompts: int) -> None:
        self.job, self.before, self.total = job, models_before * prompts, models * prompts

    def __call__(self, answered: int) -> None:
        self.job.progress(self.before + answered, self.total, {})


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What a person reads of a prompt's token ids."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _trusts(job: Job, name: str) -> bool:
    """Whether a policy's code may run; a champion's only if it is the candidate's, or it is refused."""
    if name != "champion":
        return job.trusts("ppo" if name == "ema" else name)
    folder = job.inputs["champion"]
    trusted = job.trusts("champion") and untrusted.code(folder) == untrusted.code(job.inputs["candidate"])
    untrusted.check(folder, trusted)
    return trusted


def _policy(name: str, job: Job, config: EvaluateConfig) -> Policy:
    loaded = load_policy(job.inputs[name], _trusts(job, name))
    policy: nn.Module = loaded.to(job.device, DTYPES[config.precision]).eval()
    assert isinstance(policy, Policy)
    return policy


def _columns(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The columns of one model."""
    return {key: value for key, value in row.items() if key == name or key.startswith(f"{name}_")}
