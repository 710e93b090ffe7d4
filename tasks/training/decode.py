"""What a decoding step does beside matrix products: attention over the cache, norms of sums, the choice of a token.

On a GPU each is one Triton kernel (`decode_triton.py`); here stand the same functions in plain torch, which CPUs run
and which tests hold the kernels against. Attention reads each row's own length from memory, so that one captured graph
serves all lengths and costs what the real ones cost.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Slots(NamedTuple):
    """Where each row of a step stands in the cache."""

    rows: Tensor
    """[M] int64; the row's slot, no two alike"""
    lengths: Tensor
    """[S] int64; tokens that a slot's cache holds"""
    active: Tensor
    """[S] bool; the others are left out of everything"""


class Cache(NamedTuple):
    """Keys and values of one layer."""

    keys: Tensor
    """[S, Hkv, T, D]"""
    values: Tensor
    """[S, Hkv, T, D]"""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Cache,
    slots: Slots,
    angles: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    """Append each row's key and value to its slot, then attend to all that is in it.

    Args:
        query: [M, Hq, D]; key, value: [M, Hkv, D]. Query and key are not turned yet.
        angles: cosine and sine of every position, [T, D'] each; None without rotary embeddings.

    Returns: [M, Hq, D]; of rows that are not active, anything finite.
    """
    if query.is_cuda:
        from tasks.training import decode_triton

        return decode_triton.attend(query, key, value, cache, slots, angles, scale)
    lengths = slots.lengths[slots.rows]
    if angles is not None:
        cosine, sine = (part[lengths].unsqueeze(1) for part in angles)
        query, key = turned(query, cosine, sine), turned(key, cosine, sine)
    active = slots.active[slots.rows]
    rows, places = slots.rows[active], lengths[active]
    cache.keys[rows, :, places] = key[active]
    cache.values[rows, :, places] = value[active]
    width = int(lengths.max()) + 1
    seen = torch.arange(width, device=query.device) <= lengths.unsqueeze(1)
    keys, values = (part[slots.rows, :, :width] for part in cache)
    out = F.scaled_dot_product_attention(
        query.unsqueeze(2), keys, values, seen[:, None, None], scale=scale, enable_gqa=True
    )
    return out.squeeze(2)


def turned(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, in halves as GPT-NeoX has it) of the first D' of D channels.

    Args: vectors [..., D]; cosine, sine [..., D'].
    """
    size = cosine.shape[-1]
    turning, rest = vectors[..., :size], vectors[..., size:]
    first, second = turning.chunk(2, -1)
    result = turning * cosine + torch.cat([-second, first], -1) * sine
    return torch.cat([result, rest], -1) if rest.shape[-1] else result


def add_norm(stream: Tensor, addend: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The sum of two [N, width] tensors (the first alone if there is no other) and its layer or RMS norm."""
    if addend is None:
        return stream, norm(stream)
    if stream.is_cuda and stream.shape[0] <= FUSED_ROWS:
        from tasks.training import decode_triton

        return decode_triton.add_norm(stream, addend, norm)
    total = stream + addend
    return total, norm(total)


FUSED_ROWS = 4096
"""Above this many rows a launch costs nothing beside the work, and torch's own norms are as good."""


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) x up. [N, F] each."""
    return activation(gate) * up


def choose(
    logits: Tensor, temperature: float, greedy: bool, seed: Tensor, numbers: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """A token for each row, and its log-probability under softmax(logits / temperature).

    The Gumbel trick: the largest of logits / temperature + noise is a sample. The noise is a function of the seed, the
    prompt's number and the token's place in the answer alone; so an answer is the same in whatever slot and company.

    Args:
        logits: [M, V].
        greedy: no noise.
        seed: [1] int64; numbers, counts: [M] int64.

    Returns: [M] int64 and [M] fp32.
    """
    if logits.is_cuda:
        from tasks.training import decode_triton

        return decode_triton.choose(logits, temperature, greedy, seed, numbers, counts)
    scaled = logits.float() / temperature
    noisy = scaled
    if not greedy:
        noisy = scaled.clone()
        for row, (number, count) in enumerate(zip(numbers.tolist(), counts.tolist(), strict=True)):
            generator = torch.Generator().manual_seed(key_of(int(seed), number, count))
            noisy[row] -= torch.empty(scaled.shape[1]).exponential_(generator=generator).log()
    tokens = noisy.argmax(-1)
    return tokens, scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def key_of(seed: int, number: int, count: int) -> int:
    """The key of one token's noise. Distinct for all tokens of a rollout (answers are shorter than 2^16)."""
    return (seed + (number << 16) + count) % 2**63
