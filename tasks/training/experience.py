"""From prompts to experience: answers sampled from the policy, scored by all four networks.

    prompts -> rollout -> log-probabilities of policy and reference, values, rewards -> advantages and returns

A pool holds the experience of several rollouts, padded to one shape; a mini-batch of it is cut back to its own lengths.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.config import PPOConfig
from tasks.training.advantages import Moments, explained_variance, gae, token_rewards, whiten
from tasks.training.batches import chunks, left_padded
from tasks.training.decoder import UnsupportedError
from tasks.training.engine import gathered
from tasks.training.job import Job, NotFiniteError
from tasks.training.kl import kl_estimate
from tasks.training.logprobs import TokenScores
from tasks.training.ranks import all_sum, any_rank, rank
from tasks.training.rollout import generate
from tasks.training.rollout_slots import Batch, Request, Sampling, SlotEngine
from tasks.training.types import Engine, Experience, Packed, Rollout, Sequences

SCORED_TOGETHER = 4
"""Micro-batches of one forward pass of scoring, which keeps no activations."""


class Networks(NamedTuple):
    """The four networks of PPO and the tokens that they agree on."""

    policy: Engine
    critic: Engine
    reference: Any
    reward_model: Any
    eos: int
    pad: int
    slots: "SlotEngine | GatheredSlots | None" = None
    """Samples from the policy; None: the plain loop does."""


class Scored(NamedTuple):
    """A rollout with what the networks say of it. [B, R] fp32 but for the rewards, [B]."""

    rollout: Rollout
    logprobs: Tensor
    entropy: Tensor | None
    """None where the update makes it: a pool of one optimizer step needs no forward pass of the policy before."""
    reference: Tensor
    values: Tensor
    scores: Tensor


class GatheredSlots:
    """Slots for a policy that ZeRO-3 holds in parts: it is gathered for each rollout, by an engine that ends with it.

    Args: those of SlotEngine, but the policy's network. Raises UnsupportedError as it does.
    """

    def __init__(self, network: Any, slots: int, prompt_tokens: int, answer_tokens: int) -> None:
        self.network, self.size = network, (slots, prompt_tokens, answer_tokens)
        with gathered(network):
            SlotEngine(network.model, *self.size)

    def generate(self, request: Request, sampling: Sampling) -> Batch:
        """As that of SlotEngine; all ranks call it."""
        with gathered(self.network):
            engine = SlotEngine(self.network.model, *self.size)
            batch = engine.generate(request, sampling)
            engine.shutdown()
        return batch

    def shutdown(self) -> None:
        """Nothing is kept between rollouts."""


def slot_engine(
    config: PPOConfig, policy: Engine, prompts: int, longest: tuple[int, int]
) -> SlotEngine | GatheredSlots | None:
    """The engine that samples from the policy; None where only the plain loop can, or shall.

    Args:
        prompts: of a rollout, of this process.
        longest: tokens of the longest prompt and answer.

    Raises ValueError if the config asks for slots where they cannot be.
    """
    how = config.rollout
    if how.engine == "plain":
        return None
    try:
        if config.sampling.top_k or config.sampling.top_p < 1:
            raise UnsupportedError("top_k and top_p need the plain loop")
        size = (how.slots_for(prompts), *longest)
        if how.gather:
            return GatheredSlots(policy.module, *size)
        return SlotEngine(policy.module.model, *size)
    except UnsupportedError as error:
        if how.engine == "slots":
            raise ValueError(f"ppo.rollout.engine is slots, but {error}; use auto or plain") from None
        return None


def sample(job: Job, config: PPOConfig, networks: Networks, prompts: list[list[int]], rollout_number: int) -> Rollout:
    """Answers of the policy. The randomness is that of (seed, rollout, rank), so a resumed run samples the same."""
    module = networks.policy.module
    module.eval()
    rows = left_padded(prompts, networks.pad, job.device)
    seed, limit = use_seed(job, rollout_number, 0), job.config["max_answer_tokens"]
    if networks.slots is not None:
        sampling = Sampling(limit, config.sampling.temperature, eos_id=networks.eos, pad_id=networks.pad, seed=seed)
        rollout = networks.slots.generate(Request(rows.input_ids, rows.attention_mask), sampling).rollout()
        if not config.rollout.keep_cache:
            networks.slots.shutdown()
    else:
        # Compiled layers would be compiled anew for the growing cache, until torch gives up on them, in training too.
        with gathered(module) if config.rollout.gather else nullcontext(), torch.compiler.set_stance("force_eager"):
            rollout = generate(
                module.model,
                rows,
                limit,
                networks.eos,
                networks.pad,
                config.sampling.temperature,
                torch.Generator(job.device).manual_seed(seed),
                all_done=lambda done: not any_rank(not done, job.device),
                top_k=config.sampling.top_k,
                top_p=config.sampling.top_p,
            )
    module.train()
    return rollout


@torch.no_grad()
def score(config: PPOConfig, networks: Networks, rollout: Rollout) -> Scored:
    """What the networks say of a rollout, several micro-batches at a time."""
    rows = len(rollout.answer_mask)
    parts = [
        _score_part(config, networks, rows_of(rollout.sequences, part), rollout.answer_mask[part[0] : part[-1] + 1])
        for part in chunks(range(rows), SCORED_TOGETHER * config.micro_batch_size)
    ]
    reference, values, scores = (torch.cat(column) for column in zip(*(part[1:] for part in parts), strict=True))
    logprobs, entropy = rollout.logprobs, None
    if policy := [part[0] for part in parts if part[0] is not None]:
        logprobs, entropy = (torch.cat(column) for column in zip(*policy, strict=True))
    if not bool(torch.isfinite(scores).all()):
        raise NotFiniteError("the reward model gave a score that is no number; its training diverged, see stage reward")
    return Scored(rollout, logprobs, entropy, reference, values, scores)


@torch.no_grad()
def experience_of(
    config: PPOConfig, scored: Scored, kl_coef: float, moments: Moments | None
) -> tuple[Experience, dict[str, float]]:
    """Advantages and returns of a scored rollout, and its metrics over all ranks.

    Args:
        kl_coef: weight of the KL penalty.
        moments: of the scores so far, these included, by which they are normalised; None: as they are.
    """
    rollout, mask = scored.rollout, scored.rollout.answer_mask
    rewards = scored.scores if moments is None else (scored.scores - moments.mean) / moments.std
    if config.reward_clip is not None:
        rewards = rewards.clamp(-config.reward_clip, config.reward_clip)
    rewards = rewards - config.missing_eos_penalty * (~rollout.ended).float() - config.length_penalty * mask.sum(1)
    kl = torch.where(mask, kl_estimate(scored.logprobs, scored.reference, config.kl_estimator), 0.0)
    per_token = token_rewards(rewards, kl, mask, kl_coef)
    advantages, returns = gae(per_token, scored.values, mask, config.gamma, config.gae_lambda)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, all_sum)
    experience = Experience(rollout.sequences, mask, scored.logprobs, scored.values, advantages, returns)
    return experience, _metrics(scored, kl, returns, per_token.sum(1))


def _metrics(scored: Scored, kl: Tensor, returns: Tensor, objective: Tensor) -> dict[str, float]:
    rollout, mask = scored.rollout, scored.rollout.answer_mask
    per_answer = means(
        {
            "ppo/reward": scored.scores,
            "ppo/objective": objective,
            "ppo/kl": kl.sum(1),
            "ppo/answer_tokens": mask.sum(1).float(),
            "ppo/eos_rate": rollout.ended.float(),
            "ppo/distinct_2": distinct_2(rollout),
            "ppo/reward_squared": scored.scores.square(),
        }
    )
    variance = per_answer.pop("ppo/reward_squared") - per_answer["ppo/reward"] ** 2
    per_token = {}
    if scored.entropy is not None:
        gap = (scored.logprobs - rollout.logprobs).abs()
        per_token = means_of_tokens({"ppo/entropy": scored.entropy, "rollout/logprob_gap": gap}, mask)
    return {
        **per_answer,
        **per_token,
        "ppo/reward_std": math.sqrt(max(variance, 0.0)),
        "ppo/explained_variance": explained_variance(scored.values, returns, mask, all_sum),
    }


def distinct_2(rollout: Rollout) -> Tensor:
    """The share of each answer's pairs of neighbouring tokens that are different ones; 1 without pairs. Returns [B]."""
    ids = rollout.sequences.input_ids[:, -rollout.answer_mask.shape[1] :]
    pairs = torch.where(rollout.answer_mask[:, 1:], (ids[:, :-1] << 32) + ids[:, 1:], -1)
    count = rollout.answer_mask[:, 1:].sum(1)
    in_order = pairs.sort(1).values
    first = torch.ones_like(rollout.answer_mask[:, 1:])
    first[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    different = (first & (in_order >= 0)).sum(1)
    return torch.where(count > 0, different / count.clamp(min=1), 1.0)


def pooled(parts: Sequence[Experience]) -> Experience:
    """The experience of several rollouts as one, padded to the longest prompt and the longest answer."""
    prompt = max(answers_start(part.answer_mask, part.sequences) for part in parts)
    answer = max(part.answer_mask.shape[1] for part in parts)

    def padded(part: Experience) -> Experience:
        left = prompt - answers_start(part.answer_mask, part.sequences)
        right = answer - part.answer_mask.shape[1]
        whole = Sequences(*(F.pad(column, (left, right)) for column in part.sequences))
        return Experience(whole, *(F.pad(column, (0, right)) for column in part[1:]))

    same = [padded(part) for part in parts]
    sequences = Sequences(*(torch.cat(column) for column in zip(*(part.sequences for part in same), strict=True)))
    return Experience(sequences, *(torch.cat(column) for column in zip(*(part[1:] for part in same), strict=True)))


def experience_rows(experience: Experience, rows: Tensor) -> Experience:
    """Some rows of a pool, without the columns that are padding in all of them."""
    index = rows.to(experience.answer_mask.device)
    mask = experience.answer_mask[index]
    sequences = rows_of(experience.sequences, index)
    prompt = answers_start(mask, sequences)
    answer = int(mask.any(0).sum())
    left = prompt - int(sequences.attention_mask[:, :prompt].any(0).sum())
    sequences = Sequences(*(column[:, left : prompt + answer] for column in sequences))
    return Experience(sequences, *(column[index, :answer] for column in experience[1:]))


def _score_part(
    config: PPOConfig, networks: Networks, sequences: Sequences, answer_mask: Tensor
) -> tuple[TokenScores | None, Tensor, Tensor, Tensor]:
    part = packed_actions(sequences, answer_mask)
    temperature = config.sampling.temperature
    policy = None if config.one_step else action_scores(networks.policy, part, temperature, with_entropy=True)
    reference = action_scores(networks.reference, part, temperature).logprobs
    scores = networks.reward_model(part.row)[0, part.last]
    return policy, reference, action_values(networks.critic, part), scores


class PackedActions(NamedTuple):
    """Sequences of a padded batch as one packed row, and where their actions are in it."""

    row: Packed
    actions: Tensor
    """[M] int64; places of the answers' tokens in the row"""
    last: Tensor
    """[B] int64; places of the sequences' last tokens"""
    answer_mask: Tensor
    """[B, R] bool, of the padded batch"""


def packed_actions(sequences: Sequences, answer_mask: Tensor) -> PackedActions:
    """Sequences without their padding: what the networks read costs what the real lengths cost."""
    mask = sequences.attention_mask
    ends = mask.sum(1).cumsum(0)
    places = mask.flatten().cumsum(0).view(mask.shape) - 1
    row = Packed(
        input_ids=sequences.input_ids[mask].unsqueeze(0),
        position_ids=sequences.position_ids[mask].unsqueeze(0),
        cu_seqlens=F.pad(ends, (1, 0)).int(),
        max_seqlen=mask.shape[1],
    )
    return PackedActions(row, places[:, answers_start(answer_mask, sequences) :][answer_mask], ends - 1, answer_mask)


def action_scores(network: Any, part: PackedActions, temperature: float, with_entropy: bool = False) -> TokenScores:
    """Log-probabilities and entropy of the actions. Returns: [B, R] each, 0 where masked."""
    scores = network(part.row, part.actions, temperature, with_entropy)
    entropy = None if scores.entropy is None else spread(scores.entropy, part.answer_mask)
    return TokenScores(spread(scores.logprobs, part.answer_mask), entropy)


def action_values(critic: Any, part: PackedActions) -> Tensor:
    """The critic's values of the states in which the actions were chosen. Returns: [B, R] fp32, 0 where masked."""
    return spread(critic(part.row)[0, part.actions - 1], part.answer_mask)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """[M] -> where the mask [B, R] is True, row by row; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def answers_start(answer_mask: Tensor, sequences: Sequences) -> int:
    """P: where the answers begin in every row."""
    return sequences.input_ids.shape[1] - answer_mask.shape[1]


def rows_of(sequences: Sequences, rows: Any) -> Sequences:
    """Some rows."""
    index = torch.as_tensor(rows, device=sequences.input_ids.device)
    return Sequences(*(part[index] for part in sequences))


def means(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of [B] tensors over all ranks' rows."""
    count = torch.tensor(float(len(next(iter(values.values())))))
    sums = all_sum(torch.stack([value.double().sum() for value in values.values()]))
    total = all_sum(count.to(sums))
    return {name: float(value / total) for name, value in zip(values, sums, strict=True)}


def means_of_tokens(values: dict[str, Tensor], mask: Tensor) -> dict[str, float]:
    """Means of [B, R] tensors over all ranks' unmasked tokens."""
    sums = [torch.where(mask, value, 0.0).double().sum() for value in values.values()]
    *totals, count = all_sum(torch.stack([*sums, mask.sum().double()]))
    return {name: float(total / count) for name, total in zip(values, totals, strict=True)}


def use_seed(job: Job, number: int, use: int) -> int:
    """A seed for one use of randomness in one rollout or pass on one rank."""
    return ((job.config["seed"] * 1_000_003 + number) * 1_009 + rank()) * 101 + use
