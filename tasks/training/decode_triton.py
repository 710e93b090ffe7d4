"""The kernels of a decoding step, in Triton; what they compute is said in `decode.py`.

A step reads every weight and every cached key and value once, so all that counts is that memory never waits: a program
a (row, key head) for attention, whose loop ends at the row's own length, a program a row for norms and sampling.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from tasks.training.decode import Cache, Slots

ATTEND = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
"""Best of 36 for 64 and 256 rows of OPT-1.3B's shape on an H100, with several others: 2.6 and 2.9 TB/s of its 3.35."""
VOCABULARY_BLOCK = 4096


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Cache,
    slots: Slots,
    angles: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    rows, query_heads, size = query.shape
    _, heads, capacity, _ = cache.keys.shape
    group = query_heads // heads
    out = torch.empty(rows, query_heads, size, dtype=query.dtype, device=query.device)
    cosine, sine = angles if angles is not None else (query, query)
    _attend[(rows, heads)](
        *(query, key, value, cache.keys, cache.values, out, *slots, cosine, sine, scale),
        *(query.stride(0), key.stride(0), value.stride(0), cache.keys.stride(0), capacity * size),
        GROUP=group,
        G=max(16, triton.next_power_of_2(group)),  # tensor cores take 16 rows at least
        SIZE=size,
        D=triton.next_power_of_2(size),
        TURNED=cosine.shape[-1] if angles is not None else 0,
        **ATTEND,
    )
    return out


@triton.jit
def _turned(pointer, channels, cosine, sine, TURNED: tl.constexpr, mask):  # noqa: N803
    """Channels of a vector, the first TURNED of them rotated; its other half is read again."""
    half: tl.constexpr = TURNED // 2
    vector = tl.load(pointer + channels, mask=mask, other=0.0).to(tl.float32)
    turning = channels < TURNED
    partner = tl.where(channels < half, channels + half, channels - half)
    other = tl.load(pointer + partner, mask=mask & turning, other=0.0).to(tl.float32)
    other = tl.where(channels < half, -other, other)
    cos = tl.load(cosine + channels, mask=mask & turning, other=1.0).to(tl.float32)
    sin = tl.load(sine + channels, mask=mask & turning, other=0.0).to(tl.float32)
    return vector * cos + other * sin


@triton.jit
def _attend(
    query,
    key,
    value,
    keys,
    values,
    out,
    rows,
    lengths,
    active,
    cosine,
    sine,
    scale,
    query_stride,
    key_stride,
    value_stride,
    slot_stride,
    head_stride,
    GROUP: tl.constexpr,  # noqa: N803
    G: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    D: tl.constexpr,  # noqa: N803
    TURNED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(rows + row)
    length = tl.load(lengths + slot)
    channel = tl.arange(0, D)
    in_head = channel < SIZE
    member = head * GROUP + tl.arange(0, G)
    in_group = tl.arange(0, G) < GROUP
    mask = in_group[:, None] & in_head[None, :]
    out_pointers = out + row * tl.num_programs(1) * GROUP * SIZE + member[:, None] * SIZE + channel[None, :]
    if tl.load(active + slot) == 0:
        tl.store(out_pointers, tl.zeros([G, D], tl.float32).to(out.dtype.element_ty), mask=mask)
        return
    place = slot * slot_stride + head * head_stride
    new_key_pointer = key + row * key_stride + head * SIZE
    query_pointer = query + row * query_stride + member[:, None] * SIZE
    if TURNED > 0:
        cosine_pointer, sine_pointer = cosine + length * TURNED, sine + length * TURNED
        new_key = _turned(new_key_pointer, channel, cosine_pointer, sine_pointer, TURNED, in_head)
        queries = _turned(query_pointer, channel[None, :], cosine_pointer, sine_pointer, TURNED, mask)
    else:
        new_key = tl.load(new_key_pointer + channel, mask=in_head, other=0.0).to(tl.float32)
        queries = tl.load(query_pointer + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    new_key = new_key.to(keys.dtype.element_ty)
    queries = queries.to(keys.dtype.element_ty)
    new_value = tl.load(value + row * value_stride + head * SIZE + channel, mask=in_head, other=0.0)
    tl.store(keys + place + length * SIZE + channel, new_key, mask=in_head)
    tl.store(values + place + length * SIZE + channel, new_value, mask=in_head)

    # The token attends to itself from registers, to those before it from the cache.
    highest = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    total = tl.full([G], 1.0, tl.float32)
    mixed = tl.zeros([G, D], tl.float32) + new_value.to(tl.float32)[None, :]
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        cached = (token < length)[:, None] & in_head[None, :]
        offsets = place + token[:, None] * SIZE + channel[None, :]
        block_keys = tl.load(keys + offsets, mask=cached, other=0.0)
        block_values = tl.load(values + offsets, mask=cached, other=0.0)
        scores = tl.dot(queries, tl.trans(block_keys), input_precision="ieee") * scale
        scores = tl.where((token < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(block_values.dtype), block_values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = higher
    tl.store(out_pointers, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)


def add_norm(stream: Tensor, addend: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    total, normed = torch.empty_like(stream), torch.empty_like(stream)
    weight: Any = norm.weight
    bias: Any = getattr(norm, "bias", None)
    is_layer_norm = isinstance(norm, nn.LayerNorm)
    epsilon: Any = norm.eps if is_layer_norm else norm.variance_epsilon
    rows, width = stream.shape
    _add_norm[(rows,)](
        *(stream, addend, weight, bias, total, normed, width, float(epsilon)),
        CENTRED=is_layer_norm,
        WEIGHTED=weight is not None,
        BIASED=bias is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total, normed


@triton.jit
def _add_norm(
    stream,
    addend,
    weight,
    bias,
    total,
    normed,
    width,
    epsilon,
    CENTRED: tl.constexpr,  # noqa: N803
    WEIGHTED: tl.constexpr,  # noqa: N803
    BIASED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    channel = tl.arange(0, BLOCK)
    mask = channel < width
    place = tl.program_id(0) * width + channel
    summed = tl.load(stream + place, mask=mask, other=0.0).to(tl.float32)
    summed += tl.load(addend + place, mask=mask, other=0.0).to(tl.float32)
    rounded = summed.to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=mask)
    summed = rounded.to(tl.float32)
    if CENTRED:
        summed = tl.where(mask, summed - tl.sum(summed, 0) / width, 0.0)
    result = summed / tl.sqrt(tl.sum(summed * summed, 0) / width + epsilon)
    if WEIGHTED:
        result *= tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        result += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + place, result.to(normed.dtype.element_ty), mask=mask)


def choose(
    logits: Tensor, temperature: float, greedy: bool, seed: Tensor, numbers: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _choose[(rows,)](
        *(logits, tokens, logprobs, seed, numbers, counts, vocabulary, logits.stride(0), 1 / temperature),
        GREEDY=greedy,
        BLOCK=VOCABULARY_BLOCK,
        num_warps=16,
    )
    return tokens, logprobs


@triton.jit
def _choose(
    logits,
    tokens,
    logprobs,
    seed,
    numbers,
    counts,
    vocabulary,
    stride,
    scale,
    GREEDY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    # The key of this token's noise, as `decode.key_of` has it.
    noise_key = tl.load(seed) + (tl.load(numbers + row) << 16) + tl.load(counts + row)
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)  # a softmax a lane, put together at the end
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32)
    best_logit = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + lane
        inside = token < vocabulary
        logit = tl.load(logits + row.to(tl.int64) * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
        logit *= scale
        higher = tl.maximum(highest, logit)
        total = tl.where(inside, total * tl.exp(highest - higher) + tl.exp(logit - higher), total)
        highest = higher
        noisy = logit
        if not GREEDY:
            # An exponential variate -log(1 - u); its small values, which win, keep their precision by the series.
            uniform = tl.maximum(tl.rand(noise_key, token), 1e-10)
            variate = tl.where(uniform < 1e-3, uniform * (1 + uniform / 2), -tl.log(1 - uniform))
            noisy = logit - tl.log(variate)
        better = inside & (noisy > best)
        best = tl.where(better, noisy, best)
        best_token = tl.where(better, token, best_token)
        best_logit = tl.where(better, logit, best_logit)
    top = tl.max(highest, 0)
    total_logprob = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    winner = tl.max(best, 0)
    # Of equal candidates the first token, as argmax has it.
    token = tl.min(tl.where(best == winner, best_token, 2147483647), 0)
    logit = tl.max(tl.where((best == winner) & (best_token == token), best_logit, float("-inf")), 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logit - total_logprob)
