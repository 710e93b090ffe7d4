"""PPO on the reward model's score, with a value network, a KL penalty to the SFT model, PTX and EMA.

    for every pool:
        for each of its rollouts: sample answers from the policy, score them       (experience.py, rollout.py)
        for each epoch, over shuffled mini-batches of the pool and of unsupervised text:
            one optimizer step of the policy, on PPO's loss + ptx_coef x the language-model loss
            one optimizer step of the critic
            the policy's moving average takes in the step                           (ema.py)

Schulman et al. 2017, and Ouyang et al. 2022, section 3.5 (step 3) and equation 2. Where implementations differ (the
numbers are those of Huang et al. 2024, "The N+ implementation details of RLHF with PPO"), this one takes:
  15  temperature in every log-probability, no top-p and no top-k: they would sample from another distribution
  18  an answer without EOS keeps its score minus a penalty; EOS is never appended (19)
  20  dropout off in all four models
  21  old log-probabilities from the training forward pass, so that the first ratio is 1 exactly; the gap to those of
      the sampling pass is logged as rollout/logprob_gap. Where a pool is one optimizer step, old and new are one pass,
      and the KL penalty takes the log-probabilities that were sampled
  23  KL penalty per token, in the reward, k1 by default;  29  its weight fixed or adaptive
  24  the score stands at the last action of the answer, EOS where there is one
  27  scores are normalised by running moments if asked for, never by those of one batch
  30  returns from the advantages before whitening;  31  whitening over all ranks of a rollout, unbiased variance
  32  the critic starts from the reward model;  33  value loss clipped, halved, in an optimizer of its own
  35  Adam's eps is 1e-5;  37  losses are token means over the whole optimizer batch
  45  a micro-batch whose mean ratio explodes gives no gradient; log-ratios are clamped before exp()
Reward models pay for length (Singhal et al. 2023): the score can be lowered by so much a token.
DeepSpeed-Chat doubles accumulation for PTX and averages EMA per micro-batch; here both belong to the optimizer step.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.tables import read_table
from data_prep.tokenizer import load_tokenizer, same_tokens
from tasks import json_lines
from tasks.config import LimitsConfig, PPOConfig
from tasks.training import checkpoint, samples
from tasks.training.advantages import Moments
from tasks.training.batches import batch_indices, check_batch, chunks, right_padded
from tasks.training.ema import Ema
from tasks.training.engine import Step, export, frozen_engine, step_together, train_engine
from tasks.training.experience import (
    Networks,
    action_scores,
    action_values,
    experience_of,
    experience_rows,
    packed_actions,
    pooled,
    sample,
    score,
    slot_engine,
    use_seed,
)
from tasks.training.job import Job, NotFiniteError, Stopped
from tasks.training.kl import adapted_kl_coef
from tasks.training.lora import Base, add_adapters
from tasks.training.losses import language_loss, policy_loss, value_loss
from tasks.training.models import load_policy, load_scalar
from tasks.training.ranks import all_sum, any_rank, rank, world_size
from tasks.training.types import Engine, Experience, Sequences

LOG = logging.getLogger(__name__)
SUMMARY = ("reward", "kl", "entropy", "answer_tokens", "eos_rate", "distinct_2", "explained_variance", "samples_per_s")


@dataclass
class State:
    """What changes from pool to pool beside the networks."""

    kl_coef: float
    moments: Moments = field(default_factory=Moments)
    history: list[dict[str, float]] = field(default_factory=list)
    """The pools' metrics that the summary and the limits read."""
    text_batches: int = 0
    """Batches of unsupervised text so far."""


@dataclass(frozen=True)
class Data:
    """What PPO reads: prompts, and chunks of unsupervised text where there is a PTX loss."""

    prompts: datasets.Dataset
    text: datasets.Dataset | None


def run(job: Job) -> dict[str, Any]:
    """Train; writes `model/` (the policy), `ema/` (its moving average) and `critic/`. Returns the stage's metrics."""
    config = PPOConfig.model_validate(job.config["ppo"])
    data = read(job, config)
    tokenizer = checked_tokenizer(job)
    networks = make_networks(job, config, tokenizer, longest_prompt(data.prompts))
    trained = {"policy": networks.policy, "critic": networks.critic}
    ema = Ema(networks.policy.module, config.ema_decay) if config.ema_decay is not None else None
    state, begin = State(config.kl_coef), 0
    if resumed := checkpoint.load(job.checkpoints, trained):
        begin = resumed[0]
        state = take_up(resumed[1], ema)
    if rank() == 0:
        json_lines.cut_back(job.directory / samples.SAMPLES, begin)
    LOG.info("ppo: from pool %d to %d", begin, config.steps)
    kept: dict[str, Any] = {}
    for step in range(begin, config.steps):
        metrics = train_on_pool(job, config, networks, ema, data, state, step)
        state.history.append({name: metrics[f"ppo/{name}"] for name in SUMMARY})
        job.log(step + 1, metrics)
        job.progress(step + 1, config.steps, {"reward": metrics["ppo/reward"], "kl": metrics["ppo/kl"]})
        if collapsed := beyond(config.limits, state.history):
            state = restore(job, trained, ema, collapsed)
            kept = {"collapsed": collapsed, "collapsed_at": step + 1}
            break
        stop = any_rank(job.should_stop(), job.device)
        if stop or ((step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps):
            saved = {"state": state, "ema": ema.state() if ema else None}
            checkpoint.save(job.checkpoints, step + 1, trained, saved, config.keep_checkpoints)
        if stop:
            raise Stopped(step + 1)
    LOG.info("ppo: trained")
    export(networks.policy.module, tokenizer, job.directory / "model")
    export(networks.critic.module, tokenizer, job.directory / "critic")
    if ema:
        export(networks.policy.module, tokenizer, job.directory / "ema", ema.weights())
    return summary(state.history) | kept


def read(job: Job, config: PPOConfig) -> Data:
    """The tables of a run. Raises ValueError if they are too small."""
    prompts = read_table(job.inputs["data"] / "ppo-train.arrow")
    check_batch(config.rollout_batch_size, len(prompts), "ppo.rollout_batch_size")
    check_batch(config.batch_size, config.pool_size, "ppo.batch_size")
    if config.ptx_coef == 0:
        return Data(prompts, None)
    text = read_table(job.inputs["text"] / "ptx-train.arrow")
    check_batch(config.ptx_batch_size, len(text), "ppo.ptx_batch_size")
    return Data(prompts, text)


def checked_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. Raises ValueError if the reward model reads other tokens."""
    tokenizer = load_tokenizer(job.inputs["tokenizer"], job.trusts("sft"))
    if not same_tokens(tokenizer, load_tokenizer(job.inputs["reward"], job.trusts("reward"))):
        raise ValueError(
            "policy and reward model have different tokenizers, so the critic cannot read the policy's tokens; take a "
            "models.reward with the tokenizer of models.policy, or leave it out"
        )
    return tokenizer


def longest_prompt(prompts: datasets.Dataset) -> int:
    """Tokens of the longest prompt of a table."""
    return int(pc.max(pc.list_value_length(prompts.data["prompt"])).as_py())


def make_networks(job: Job, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> Networks:
    """Policy and reference from SFT, critic and reward model from the reward stage, each under its own engine.

    `prompt_tokens` are those of the longest prompt.
    """
    steps = config.steps * config.epochs * (config.pool_size // config.batch_size)
    device, pad = job.device, tokenizer.pad_token_id
    policy_model = load_policy(job.inputs["sft"], job.trusts("sft"))
    critic_model = load_scalar(job.inputs["reward"], pad, trusted=job.trusts("reward"))
    if config.policy_lora is not None:
        add_adapters(policy_model.model, config.policy_lora, "ppo.policy_lora")
    if config.critic_lora is not None:
        add_adapters(critic_model.model, config.critic_lora, "ppo.critic_lora")
    policy = train_engine(
        policy_model,
        config.policy_engine,
        config.policy_optimizer,
        steps,
        device,
        "ppo.policy_engine",
    )
    critic = train_engine(
        critic_model,
        config.critic_engine,
        config.critic_optimizer,
        steps,
        device,
        "ppo.critic_engine",
    )
    if config.policy_lora is not None:
        reference: Any = Base(policy)
    else:
        own = load_policy(job.inputs["sft"], job.trusts("sft"))
        reference = frozen_engine(own, config.reference_engine, device, "ppo.reference_engine")
    reward_model = load_scalar(job.inputs["reward"], pad, trusted=job.trusts("reward"))
    return Networks(
        policy=policy,
        critic=critic,
        reference=reference,
        reward_model=frozen_engine(reward_model, config.reward_engine, device, "ppo.reward_engine"),
        eos=tokenizer.eos_token_id,
        pad=pad,
        slots=slot_engine(
            config,
            policy,
            config.rollout_batch_size // world_size(),
            (prompt_tokens, job.config["max_answer_tokens"]),
        ),
    )


def train_on_pool(
    job: Job, config: PPOConfig, networks: Networks, ema: Ema | None, data: Data, state: State, step: int
) -> dict[str, float]:
    """The rollouts of one pool and the optimizer steps on it. Returns the pool's metrics, over all ranks."""
    experience, metrics = make_pool(job, config, networks, data, state, step)
    started = time.perf_counter()
    metrics |= update(job, config, networks, ema, data, state, experience, step)
    metrics["time/train_s"] = time.perf_counter() - started
    seconds = sum(metrics[f"time/{part}_s"] for part in ("generate", "score", "train"))
    metrics["ppo/kl_coef"] = state.kl_coef
    if config.kl_target is not None:
        state.kl_coef = adapted_kl_coef(
            state.kl_coef, metrics["ppo/kl"], config.kl_target, config.pool_size, config.kl_horizon
        )
    tokens = metrics["ppo/answer_tokens"] * config.pool_size
    return metrics | {
        "ppo/samples_per_s": config.pool_size / seconds,
        "rollout/tokens_per_s": tokens / metrics["time/generate_s"],
    }


def make_pool(
    job: Job, config: PPOConfig, networks: Networks, data: Data, state: State, step: int
) -> tuple[Experience, dict[str, float]]:
    """The experience of `generation_batches` rollouts, and the means of their metrics."""
    parts, columns = [], defaultdict(list)
    for number in range(step * config.generation_batches, (step + 1) * config.generation_batches):
        clock = time.perf_counter()
        rows = batch_indices(number, len(data.prompts), config.rollout_batch_size, job.config["seed"])
        rollout = sample(job, config, networks, [data.prompts[row]["prompt"] for row in rows], number)
        generated = time.perf_counter()
        scored = score(config, networks, rollout)
        first = number == step * config.generation_batches
        if first and rank() == 0 and samples.is_kept(step, config.steps):
            samples.keep(job.directory, step, scored)
        if config.normalise_rewards:
            state.moments = state.moments.with_scores(scored.scores, all_sum)
        moments = state.moments if config.normalise_rewards else None
        experience, metrics = experience_of(config, scored, state.kl_coef, moments)
        parts.append(experience)
        seconds = {"time/generate_s": generated - clock, "time/score_s": time.perf_counter() - generated}
        for name, value in (metrics | seconds).items():
            columns[name].append(value)
    merge = {"time/generate_s": sum, "time/score_s": sum}
    return pooled(parts), {name: merge.get(name, _mean)(values) for name, values in columns.items()}


def update(
    job: Job,
    config: PPOConfig,
    networks: Networks,
    ema: Ema | None,
    data: Data,
    state: State,
    experience: Experience,
    step: int,
) -> dict[str, float]:
    """The optimizer steps on one pool. Returns means over its mini-batches."""
    share = config.batch_size // world_size()
    seen: dict[str, list[float]] = defaultdict(list)
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(use_seed(job, step, 1 + epoch))
        order = torch.randperm(len(experience.answer_mask), generator=generator)
        for rows in order.split(share):
            batches = [experience_rows(experience, part) for part in rows.split(config.micro_batch_size)]
            text = next_text(job, config, networks, data, state)
            metrics = optimizer_steps(config, networks, batches, text)
            if ema:
                ema.update()
            for name, value in metrics.items():
                seen[name].append(value)
            if config.max_approx_kl is not None and metrics["ppo/approx_kl"] > config.max_approx_kl:
                return _means(seen) | {"ppo/stopped_early": 1.0}
    return _means(seen)


def next_text(job: Job, config: PPOConfig, networks: Networks, data: Data, state: State) -> list[Sequences]:
    """This rank's next chunks of unsupervised text, as micro-batches; every pass over the text is shuffled anew."""
    if data.text is None:
        return []
    rows = batch_indices(state.text_batches, len(data.text), config.ptx_batch_size, job.config["seed"] + 1)
    state.text_batches += 1
    text = [data.text[row]["tokens"] for row in rows]
    return [right_padded(part, networks.pad, job.device) for part in chunks(text, config.micro_batch_size)]


def optimizer_steps(
    config: PPOConfig, networks: Networks, batches: list[Experience], text: list[Sequences]
) -> dict[str, float]:
    """One optimizer step of policy and critic. Returns their metrics over all ranks.

    Args:
        batches: this rank's micro-batches of experience.
        text: this rank's micro-batches of unsupervised text, learnt in the same step of the policy.
    """
    tokens = torch.stack([batch.answer_mask.sum() for batch in batches]).sum()
    text_tokens = torch.stack([t.attention_mask[:, 1:].sum() for t in text]).sum() if text else None
    # The engine divides all losses by the answers' tokens; the text's loss shall be a mean over the text's own.
    text_scale = 0.0 if text_tokens is None else config.ptx_coef * float(all_sum(tokens) / all_sum(text_tokens))
    sums: dict[str, list[Tensor]] = defaultdict(list)
    # Before the first forward pass, since leaving padding out waits for the GPU.
    packed = {id(batch): packed_actions(batch.sequences, batch.answer_mask) for batch in batches}

    def policy_loss_of(batch: Experience | Sequences) -> Tensor:
        if isinstance(batch, Sequences):
            loss = language_loss(networks.policy(batch, 1).logprobs, batch.attention_mask[:, 1:])
            sums["ptx"].append(loss.detach())
            return text_scale * loss
        made = action_scores(
            networks.policy, packed[id(batch)], config.sampling.temperature, with_entropy=config.one_step
        )
        new, old = made.logprobs, batch.logprobs
        if made.entropy is not None:
            gap = torch.where(batch.answer_mask, (new.detach() - old).abs(), 0.0)
            sums["ppo/entropy"].append(torch.where(batch.answer_mask, made.entropy, 0.0).sum())
            sums["rollout/logprob_gap"].append(gap.sum())
            old = new.detach()
        loss, stats = policy_loss(new, old, batch.advantages, batch.answer_mask, config.clip_range)
        exploded = exploding(stats.ratio, batch.answer_mask, config.max_ratio)
        sums["ppo/policy_loss"].append(loss.detach())
        sums["ppo/approx_kl"].append(stats.approx_kl)
        sums["ppo/clip_fraction"].append(stats.clipped)
        sums["ppo/ratio"].append(stats.ratio)
        sums["ppo/exploded"].append(exploded * batch.answer_mask.sum())
        return torch.where(exploded, 0.0, loss)

    def value_loss_of(batch: Experience) -> Tensor:
        new = action_values(networks.critic, packed[id(batch)])
        loss, clipped = value_loss(new, batch.values, batch.returns, batch.answer_mask, config.value_clip_range)
        sums["ppo/value_loss"].append(loss.detach())
        sums["ppo/value_clip_fraction"].append(clipped)
        return loss

    mixed: list[Experience | Sequences] = [*batches, *text]
    policy_report, critic_report = step_together(
        [
            Step(networks.policy, mixed, policy_loss_of, float(tokens)),
            Step(networks.critic, batches, value_loss_of, float(tokens)),
        ]
    )
    totals = dict(zip(sums, all_sum(torch.stack([torch.stack(v).sum().double() for v in sums.values()])), strict=True))
    result = {}
    if text_tokens is not None:
        result["ppo/ptx_loss"] = float(totals.pop("ptx") / all_sum(text_tokens))
    result |= {name: float(total / all_sum(tokens)) for name, total in totals.items()}
    if not all(math.isfinite(value) for value in result.values()):
        raise NotFiniteError(
            "a loss of PPO is no number; lower ppo.policy_optimizer.learning_rate and "
            "ppo.critic_optimizer.learning_rate, or use precision bf16 or fp32"
        )
    result["ppo/skipped"] = float(policy_report.skipped)
    if policy_report.skipped:
        return result
    return result | {
        "ppo/policy_grad_norm": policy_report.grad_norm,
        "ppo/critic_grad_norm": critic_report.grad_norm,
        "ppo/learning_rate": policy_report.learning_rate,
    }


def exploding(ratios: Tensor, mask: Tensor, limit: float | None) -> Tensor:
    """Whether the mean of a micro-batch's probability ratios is above the limit. Args: their sum. Returns: [] bool."""
    if limit is None:
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    return ratios > limit * mask.sum()


def beyond(limits: LimitsConfig, history: list[dict[str, float]]) -> str | None:
    """The limit that the means of the last rollouts are beyond, as a sentence; None if there is none."""
    last = history[-limits.rollouts :]
    if len(last) < limits.rollouts:
        return None
    kl, eos_rate, distinct = (_mean([step[name] for step in last]) for name in ("kl", "eos_rate", "distinct_2"))
    if limits.kl is not None and kl > limits.kl:
        return f"KL {kl:.1f} is above ppo.limits.kl {limits.kl:g}"
    if limits.eos_rate is not None and eos_rate < limits.eos_rate:
        return f"EOS rate {eos_rate:.2f} is below ppo.limits.eos_rate {limits.eos_rate:g}"
    if limits.distinct_2 is not None and distinct < limits.distinct_2:
        return f"distinct-2 {distinct:.2f} is below ppo.limits.distinct_2 {limits.distinct_2:g}"
    return None


def restore(job: Job, trained: Mapping[str, Engine], ema: Ema | None, why: str) -> State:
    """Go back to the last checkpoint, which was within the limits. ValueError if there is none."""
    resumed = checkpoint.load(job.checkpoints, trained)
    if resumed is None:
        raise ValueError(
            f"PPO collapsed before its first checkpoint: {why}; lower ppo.policy_optimizer.learning_rate, or raise "
            "ppo.kl_coef or ppo.gae_lambda"
        )
    return take_up(resumed[1], ema)


def take_up(saved: Mapping[str, Any], ema: Ema | None) -> State:
    """What a checkpoint holds beside the networks; its average goes into `ema`."""
    if ema:
        ema.load(saved["ema"])
    state: State = saved["state"]
    return state


def summary(history: list[dict[str, float]]) -> dict[str, Any]:
    """The stage's metrics: means over the last tenth of the pools, at least one, beside the first reward."""
    last = history[-max(1, len(history) // 10) :]
    means = {name: _mean([step[name] for step in last]) for name in SUMMARY}
    return {"steps": len(history), "first_reward": history[0]["reward"], **means}


def _means(columns: dict[str, list[float]]) -> dict[str, float]:
    return {name: _mean(values) for name, values in columns.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
