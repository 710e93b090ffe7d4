"""cuDNN's causal attention for a packed row whose samples have one length, as an operator that compilation keeps whole.

On Hopper it is faster than Flash Attention 2, which is behind `torch.nn.attention.varlen`. Such a row is a plain batch:
this is one of the operators behind torch's `scaled_dot_product_attention`, called by its name since that function
chooses another one where it sees fit.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

HEAD_SIZES = range(8, 129, 8)
"""Channels of a head that the kernels take."""


@cache
def is_fast(device: torch.device) -> bool:
    """Whether this device is one for which cuDNN's kernels were measured to be the faster ones."""
    return (
        device.type == "cuda"
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor, samples: int, scale: float) -> Tensor:
    """Causal attention inside each of `samples` equal parts of a row. Args: [N, heads, D] each. Returns: the same."""
    output: Tensor = torch.ops.rlhf.dense_attention(query, key, value, samples, scale)[0]
    return output


@torch.library.custom_op("rlhf::dense_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, samples: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns: the output, log-sum-exps [samples, heads, length, 1], and two numbers of the unused dropout."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(_batch(heads, samples) for heads in (query, key, value)), None, True, 0.0, True, False, scale=scale
    )
    return _row(found[0]), found[1], found[6].clone(), found[7].clone()


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, samples: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, heads, _ = query.shape
    number = query.new_empty((), dtype=torch.int64)
    sums = query.new_empty(samples, heads, tokens // samples, 1, dtype=torch.float32)
    return query.new_empty(query.shape), sums, number, number.clone()


@torch.library.custom_op("rlhf::dense_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    seed: Tensor,
    offset: Tensor,
    samples: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    length = query.shape[0] // samples
    rows = (_batch(heads, samples) for heads in (gradient, query, key, value, output))
    none: Any = None  # no bias, no cumulative lengths
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *rows, sums, seed, offset, none, none, none, length, length, 0.0, True, scale=scale
    )
    return _row(found[0]), _row(found[1]), _row(found[2])


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, ctx.samples, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _gradients(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    found = torch.ops.rlhf.dense_attention_backward(gradient, *ctx.saved_tensors, ctx.samples, ctx.scale)
    return (*found, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def _batch(row: Tensor, samples: int) -> Tensor:
    """[N, heads, D] -> [samples, heads, N / samples, D]."""
    return row.contiguous().unflatten(0, (samples, -1)).transpose(1, 2)


def _row(batch: Tensor) -> Tensor:
    """[samples, heads, length, D] -> [N, heads, D]."""
    return batch.transpose(1, 2).flatten(0, 1).contiguous()
