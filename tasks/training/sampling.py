"""Answers to many prompts, for evaluation and batches: in slots that are refilled as answers end, or a batch at a time.

Slots are what PPO samples in (`rollout_slots.py`). The plain loop stays for families that these do not know, for
truncated distributions, and on a CPU for prompts that one batch holds: there it is as fast, and needs no DeepSpeed.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tasks.training.batches import chunks, left_padded, positions
from tasks.training.rollout import generate
from tasks.training.types import Rollout, Sequences

BATCHES_TOGETHER = 4
"""So many batches of prompts share the slots of one, so that few stand empty; more, and progress is seldom told."""


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    limit: int
    """Tokens of an answer, at most."""
    temperature: float
    """0: always the likeliest token."""
    eos: int
    pad: int
    seed: int
    top_k: int = 0
    top_p: float = 1.0


def answers(
    model: Any, prompts: Sequence[Sequence[int]], how: Drawing, batch_size: int, device: torch.device
) -> Iterator[Rollout]:
    """The answers of a causal language model, a rollout for every `batch_size` prompts, in their order.

    They are a function of the weights, the seed and the prompts' places alone.
    """
    engine = _slots(model, prompts, how, batch_size, device)
    for number, piece in enumerate(chunks(prompts, batch_size * (BATCHES_TOGETHER if engine else 1))):
        rows, seed = left_padded(piece, how.pad, device), how.seed + number
        if engine is None:
            random = torch.Generator(device).manual_seed(seed) if how.temperature else None
            limits = how.limit, how.eos, how.pad, how.temperature or 1.0
            yield generate(model, rows, *limits, random, top_k=how.top_k, top_p=how.top_p)
        else:
            whole = engine(rows, seed)
            yield from (cut(whole, start, start + batch_size) for start in range(0, len(piece), batch_size))


def cut(rollout: Rollout, start: int, stop: int) -> Rollout:
    """Rows of a rollout, without the columns that are padding in all of them."""
    sequences, answered = rollout.sequences, rollout.answer_mask[start:stop]
    mask = sequences.attention_mask[start:stop]
    first = int(mask[:, : rollout.start].any(0).int().argmax())
    longest = max(1, int(answered.sum(1).max()))
    columns = slice(first, rollout.start + longest)
    kept = mask[:, columns]
    return Rollout(
        Sequences(sequences.input_ids[start:stop, columns], kept, positions(kept)),
        answered[:, :longest],
        rollout.logprobs[start:stop, :longest],
        rollout.ended[start:stop],
    )


def _slots(model: Any, prompts: Sequence[Sequence[int]], how: Drawing, batch_size: int, device: torch.device) -> Any:
    """(prompts, seed) -> rollout, in slots; None where the plain loop has to do, or does as well."""
    if how.top_k or how.top_p < 1 or len(prompts) <= (batch_size if device.type == "cpu" else 0):
        return None
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    from tasks.training.decoder import UnsupportedError
    from tasks.training.rollout_slots import Request, Sampling, SlotEngine  # late: DeepSpeed takes seconds

    try:
        engine = SlotEngine(model, min(batch_size, len(prompts)), max(map(len, prompts)), how.limit)
    except UnsupportedError:
        return None

    def sample(rows: Sequences, seed: int) -> Rollout:
        sampling = Sampling(
            how.limit, how.temperature or 1.0, eos_id=how.eos, pad_id=how.pad, seed=seed, greedy=not how.temperature
        )
        return engine.generate(Request(rows.input_ids, rows.attention_mask), sampling).rollout()

    return sample
