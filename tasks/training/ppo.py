"""PPO on the reward model's score, with a value network and a KL penalty to the SFT model.

    for every batch of prompts:
        1. sample answers from the policy                     (rollout.py)
        2. score them: log-probabilities of policy and reference, values, rewards
        3. advantages and returns                              (advantages.py)
        4. for each epoch, over shuffled mini-batches: one optimizer step of policy and of critic

Schulman et al. 2017, and Ouyang et al. 2022, section 3.5 (step 3). Where implementations differ (the numbers are those
of Huang et al. 2024, "The N+ implementation details of RLHF with PPO"), this one takes:
  15  temperature in every log-probability, no top-p and no top-k: they would sample from another distribution
  18  an answer without EOS keeps its score minus a penalty; EOS is never appended (19)
  20  dropout off in all four models
  21  old log-probabilities from the training forward pass, so that the first ratio is 1 exactly; the gap to those of
      the sampling pass is logged as rollout/logprob_gap
  23  KL penalty per token, in the reward, k1 by default
  24  the score stands at the last action of the answer, EOS where there is one
  30  returns from the advantages before whitening;  31  whitening over all ranks, unbiased variance
  32  the critic starts from the reward model;  33  value loss clipped, halved
  35  Adam's eps is 1e-5;  37  losses are token means over the whole optimizer batch
Not yet here: PTX, EMA, LoRA, adaptive KL, early stop on KL.
"""

import math
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from data_prep.tables import read_table
from data_prep.tokenizer import load_tokenizer
from tasks.config import PPOConfig
from tasks.training import checkpoint
from tasks.training.advantages import explained_variance, gae, token_rewards, whiten
from tasks.training.batches import at, batch_indices, check_batch, chunks, left_padded
from tasks.training.engine import export, frozen_engine, train_engine
from tasks.training.job import Job, NotFiniteError, Stopped
from tasks.training.kl import kl_estimate
from tasks.training.losses import policy_loss, value_loss
from tasks.training.models import load_policy, load_scalar
from tasks.training.ranks import all_sum, any_rank, rank, world_size
from tasks.training.rollout import generate
from tasks.training.types import Engine, Experience, Rollout, Sequences


class Actors:
    """The four networks of PPO and the tokens they agree on."""

    def __init__(self, job: Job, config: PPOConfig) -> None:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        self.tokenizer, self.eos, self.pad = tokenizer, tokenizer.eos_token_id, tokenizer.pad_token_id
        steps = config.steps * config.epochs * (config.rollout_batch_size // config.batch_size)
        device = job.device
        self.policy: Engine = train_engine(
            load_policy(job.inputs["sft"]),
            config.policy_engine,
            config.policy_optimizer,
            steps,
            device,
            "ppo.policy_engine",
        )
        critic = load_scalar(job.inputs["reward"], self.pad)
        self.critic: Engine = train_engine(
            critic, config.critic_engine, config.critic_optimizer, steps, device, "ppo.critic_engine"
        )
        reference = load_policy(job.inputs["sft"])
        self.reference = frozen_engine(reference, config.reference_engine, device, "ppo.reference_engine")
        reward_model = load_scalar(job.inputs["reward"], self.pad)
        self.score_mean = reward_model.score_mean
        self.reward_model = frozen_engine(reward_model, config.reward_engine, device, "ppo.reward_engine")

    @property
    def trained(self) -> dict[str, Engine]:
        return {"policy": self.policy, "critic": self.critic}


def run(job: Job) -> dict[str, Any]:
    """Train; writes `model/` (the policy) and `critic/`. Returns the stage's metrics."""
    config = PPOConfig.model_validate(job.config["ppo"])
    prompts = read_table(job.inputs["data"] / "ppo-train.arrow")
    check_batch(config.rollout_batch_size, len(prompts), "ppo.rollout_batch_size")
    check_batch(config.batch_size, len(prompts), "ppo.batch_size")
    actors = Actors(job, config)
    resumed = checkpoint.load(job.checkpoints, actors.trained)
    begin, history = (resumed[0], resumed[1]["history"]) if resumed else (0, [])
    for step in range(begin, config.steps):
        rows = batch_indices(step, len(prompts), config.rollout_batch_size, job.config["seed"])
        metrics = train_step(job, config, actors, [prompts[row]["prompt"] for row in rows], step)
        history.append(metrics)
        job.log(step + 1, metrics)
        job.progress(step + 1, config.steps, {"reward": metrics["ppo/reward"], "kl": metrics["ppo/kl"]})
        stop = any_rank(job.should_stop(), job.device)
        if stop or ((step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps):
            checkpoint.save(job.checkpoints, step + 1, actors.trained, {"history": history})
        if stop:
            raise Stopped(step + 1)
    export(actors.policy.module, actors.tokenizer, job.directory / "model")
    export(actors.critic.module, actors.tokenizer, job.directory / "critic")
    return summary(history)


def train_step(job: Job, config: PPOConfig, actors: Actors, prompts: list[list[int]], step: int) -> dict[str, float]:
    """One rollout and the optimizer steps on it. Returns the step's metrics, over all ranks."""
    clock = time.perf_counter()
    rollout = sample(job, config, actors, prompts, step)
    generated = time.perf_counter()
    experience, metrics = score(job, config, actors, rollout)
    scored = time.perf_counter()
    metrics |= update(job, config, actors, experience, step)
    trained = time.perf_counter()
    return metrics | {
        "time/generate_s": generated - clock,
        "time/score_s": scored - generated,
        "time/train_s": trained - scored,
        "ppo/samples_per_s": config.rollout_batch_size / (trained - clock),
        "rollout/tokens_per_s": metrics["ppo/answer_tokens"] * config.rollout_batch_size / (generated - clock),
    }


def sample(job: Job, config: PPOConfig, actors: Actors, prompts: list[list[int]], step: int) -> Rollout:
    """Answers of the policy. The randomness is that of (seed, step, rank), so a resumed step samples the same."""
    module = actors.policy.module
    module.eval()
    generator = torch.Generator(job.device).manual_seed(_seed(job, step, 0))
    rollout = generate(
        module.model,
        left_padded(prompts, actors.pad, job.device),
        job.config["max_answer_tokens"],
        actors.eos,
        actors.pad,
        config.sampling.temperature,
        generator,
        all_done=lambda done: not any_rank(not done, job.device),
    )
    module.train()
    return rollout


@torch.no_grad()
def score(job: Job, config: PPOConfig, actors: Actors, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
    """Log-probabilities, values, rewards and advantages of a rollout, and its metrics."""
    mask, start = rollout.answer_mask, _start(rollout.answer_mask, rollout.sequences)
    parts = [
        _score_part(config, actors, _rows(rollout.sequences, part), start)
        for part in chunks(range(len(mask)), config.micro_batch_size)
    ]
    logprobs, entropy, reference, values, rewards = (torch.cat(column) for column in zip(*parts, strict=True))
    scores = rewards - actors.score_mean
    if not bool(torch.isfinite(scores).all()):
        raise NotFiniteError("the reward model gave a score that is no number; its training diverged, see stage reward")
    penalised = scores if config.reward_clip is None else scores.clamp(-config.reward_clip, config.reward_clip)
    penalised = penalised - config.missing_eos_penalty * (~rollout.ended).float()
    kl = torch.where(mask, kl_estimate(logprobs, reference, config.kl_estimator), 0.0)
    rewards_per_token = token_rewards(penalised, kl, mask, config.kl_coef)
    advantages, returns = gae(rewards_per_token, values, mask, config.gamma, config.gae_lambda)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, all_sum)
    lengths = mask.sum(1).float()
    per_sequence = _means(
        {
            "ppo/reward": scores,
            "ppo/kl": kl.sum(1),
            "ppo/answer_tokens": lengths,
            "ppo/eos_rate": rollout.ended.float(),
            "ppo/reward_squared": scores.square(),
        }
    )
    variance = per_sequence.pop("ppo/reward_squared") - per_sequence["ppo/reward"] ** 2
    gap = torch.where(mask, (logprobs - rollout.logprobs).abs(), 0.0)
    per_token = _means_of_tokens({"ppo/entropy": entropy, "rollout/logprob_gap": gap}, mask)
    metrics = (
        per_sequence
        | per_token
        | {
            "ppo/reward_std": math.sqrt(max(variance, 0.0)),
            "ppo/explained_variance": explained_variance(values, returns, mask, all_sum),
        }
    )
    return Experience(rollout.sequences, mask, logprobs, values, advantages, returns), metrics


def update(job: Job, config: PPOConfig, actors: Actors, experience: Experience, step: int) -> dict[str, float]:
    """The optimizer steps of one rollout. Returns means over its mini-batches."""
    share = config.batch_size // world_size()
    seen: dict[str, list[float]] = defaultdict(list)
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(_seed(job, step, 1 + epoch))
        order = torch.randperm(len(experience.answer_mask), generator=generator)
        for rows in order.split(share):
            micro_batches = [_experience_rows(experience, part) for part in rows.split(config.micro_batch_size)]
            for name, value in _optimizer_steps(config, actors, micro_batches).items():
                seen[name].append(value)
    return {name: sum(values) / len(values) for name, values in seen.items()}


def summary(history: list[dict[str, float]]) -> dict[str, Any]:
    """The stage's metrics: means over the last tenth of the steps, at least one, beside those of the first."""
    last = history[-max(1, len(history) // 10) :]
    names = ("reward", "kl", "entropy", "answer_tokens", "eos_rate", "explained_variance", "samples_per_s")
    means = {name: sum(step[f"ppo/{name}"] for step in last) / len(last) for name in names}
    return {"steps": len(history), "first_reward": history[0]["ppo/reward"], **means}


def _optimizer_steps(config: PPOConfig, actors: Actors, micro_batches: list[Experience]) -> dict[str, float]:
    tokens = torch.stack([batch.answer_mask.sum() for batch in micro_batches]).sum()
    sums: dict[str, list[Tensor]] = defaultdict(list)

    def policy_loss_of(batch: Experience) -> Tensor:
        start = _start(batch.answer_mask, batch.sequences)
        new = actors.policy(batch.sequences, start, config.sampling.temperature).logprobs
        loss, stats = policy_loss(new, batch.logprobs, batch.advantages, batch.answer_mask, config.clip_range)
        sums["ppo/policy_loss"].append(loss.detach())
        for name, value in stats._asdict().items():
            sums[{"clipped": "ppo/clip_fraction"}.get(name, f"ppo/{name}")].append(value)
        return loss

    def value_loss_of(batch: Experience) -> Tensor:
        start = _start(batch.answer_mask, batch.sequences)
        new = actors.critic(batch.sequences)[:, start - 1 : -1]
        loss, clipped = value_loss(new, batch.values, batch.returns, batch.answer_mask, config.value_clip_range)
        sums["ppo/value_loss"].append(loss.detach())
        sums["ppo/value_clip_fraction"].append(clipped)
        return loss

    policy_report = actors.policy.optimizer_step(micro_batches, policy_loss_of, float(tokens))
    critic_report = actors.critic.optimizer_step(micro_batches, value_loss_of, float(tokens))
    totals = all_sum(torch.stack([torch.stack(values).sum() for values in sums.values()]))
    means = {name: float(total / all_sum(tokens)) for name, total in zip(sums, totals, strict=True)}
    if not all(math.isfinite(value) for value in means.values()):
        raise NotFiniteError(
            "a loss of PPO is no number; lower ppo.policy_optimizer.learning_rate and "
            "ppo.critic_optimizer.learning_rate, or use precision bf16 or fp32"
        )
    return means | {
        "ppo/policy_grad_norm": policy_report.grad_norm,
        "ppo/critic_grad_norm": critic_report.grad_norm,
        "ppo/learning_rate": policy_report.learning_rate,
    }


def _score_part(
    config: PPOConfig, actors: Actors, sequences: Sequences, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    policy = actors.policy(sequences, start, config.sampling.temperature, with_entropy=True)
    reference = actors.reference(sequences, start, config.sampling.temperature).logprobs
    values = actors.critic(sequences)[:, start - 1 : -1]
    last = last_token(sequences.attention_mask)
    return policy.logprobs, policy.entropy, reference, values, at(actors.reward_model(sequences), last)


def last_token(attention_mask: Tensor) -> Tensor:
    """Position of each row's last real token. [B, T] bool -> [B] int64."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask, places, -1).amax(1)


def _start(answer_mask: Tensor, sequences: Sequences) -> int:
    """P: where the answers begin in every row."""
    return sequences.input_ids.shape[1] - answer_mask.shape[1]


def _rows(sequences: Sequences, rows: Any) -> Sequences:
    index = torch.as_tensor(rows, device=sequences.input_ids.device)
    return Sequences(*(part[index] for part in sequences))


def _experience_rows(experience: Experience, rows: Tensor) -> Experience:
    index = rows.to(experience.answer_mask.device)
    return Experience(_rows(experience.sequences, index), *(part[index] for part in experience[1:]))


def _means(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of [B] tensors over all ranks' rows."""
    count = torch.tensor(float(len(next(iter(values.values())))))
    sums = all_sum(torch.stack([value.double().sum() for value in values.values()]))
    total = all_sum(count.to(sums))
    return {name: float(value / total) for name, value in zip(values, sums, strict=True)}


def _means_of_tokens(values: dict[str, Tensor], mask: Tensor) -> dict[str, float]:
    """Means of [B, R] tensors over all ranks' unmasked tokens."""
    sums = [torch.where(mask, value, 0.0).double().sum() for value in values.values()]
    *totals, count = all_sum(torch.stack([*sums, mask.sum().double()]))
    return {name: float(total / count) for name, total in zip(values, totals, strict=True)}


def _seed(job: Job, step: int, use: int) -> int:
    """A seed for one use of randomness in one step on one rank."""
    return ((job.config["seed"] * 1_000_003 + step) * 1_009 + rank()) * 101 + use
