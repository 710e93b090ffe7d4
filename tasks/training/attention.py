"""Attention inside each sample of a packed row, and plain attention for padded batches, under one name.

`use_packed` gives a model the attention implementation "packed". Transformers then calls `packed_attention` in every
layer, with whatever the caller of the model passed on: `cu_seqlens` and `max_seqlen` for a packed row (`inside` gives
them), nothing for a padded batch, which goes to transformers' SDPA with its masks. The name is registered for masks as
well: a name that is not gets no mask at all, and padding would be attended to.

On CUDA in half precision this is `torch.nn.attention.varlen` (Flash Attention; Dao 2023), or cuDNN's where that is
faster; elsewhere each sample becomes a row of a padded SDPA, which is as exact: a real token never attends to the
padding on its right.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tasks.training.attention_cudnn import HEAD_SIZES, dense_attention, is_fast
from tasks.training.packing import is_dense
from tasks.training.types import Packed

PACKED = "packed"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox", "gpt2")
"""Model types of which it is tested that no token of a packed row sees another sample."""


def use_packed(model: PreTrainedModel) -> None:
    """Let a model read packed rows beside padded batches.

    Raises ValueError for a type of transformers that is not known to keep samples apart, and for a class that a model
    brings itself, whatever type it names, that is seen not to.
    """
    own = brings_code(model)
    if not own and model.config.model_type not in FAMILIES:
        raise ValueError(
            f"models of type {model.config.model_type} are not known to keep attention inside packed samples; take one "
            f"of {', '.join(FAMILIES)}"
        )
    model.set_attn_implementation(PACKED)
    if own and not _keeps_apart(model):
        raise ValueError(
            f"in {type(model).__name__}, the code that the model brings, a token of a packed row sees other samples; "
            "its attention has to be that of transformers' AttentionInterface, with all keyword arguments handed on"
        )


def brings_code(model: PreTrainedModel) -> bool:
    """Whether a model's class is not one of transformers' own, so that its forward may be any."""
    return not type(model).__module__.startswith("transformers.")


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel) -> bool:
    """Whether two short samples in a row give the states that each gives alone. The model is in eval mode."""
    backbone = getattr(model, model.base_model_prefix)

    def states(*lengths: int, begin: int = 0) -> Tensor:
        place = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        ids = torch.arange(begin, begin + place.shape[1]).unsqueeze(0) % model.config.vocab_size
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        row = Packed(ids.to(model.device), place.to(model.device), ends.to(model.device), max(lengths))
        found: Tensor = backbone(**inside(row), use_cache=False).last_hidden_state[0]
        return found

    try:
        together, alone = states(5, 4), torch.cat([states(5), states(4, begin=5)])
    except TypeError:  # it does not take the keyword arguments
        return False
    return torch.allclose(together, alone, rtol=1e-3, atol=1e-4)


def inside(row: Packed) -> dict[str, Any]:
    """The keyword arguments by which a transformers model reads a packed row."""
    device, tokens = row.input_ids.device, row.input_ids.shape[1]
    # cuDNN plans anew for each shape, so only for lengths of which there are few.
    even = row.max_seqlen % 128 == 0 and is_dense(row.cu_seqlens, row.max_seqlen, tokens)
    return {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        # A mask of four dimensions counts as prepared, and nothing of size [N, N] is made; it is not read.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "cu_seqlens": row.cu_seqlens,
        "max_seqlen": row.max_seqlen,
        # Decided here, since compiled layers cannot ask. Its backward pass adds in no fixed order.
        "by_cudnn": even and is_fast(device) and not torch.are_deterministic_algorithms_enabled(),
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    sliding_window: int | None = None,
    by_cudnn: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it.

    Args:
        query: [B, heads, T, D]; key and value: [B, key heads, T, D]. B = 1 with `cu_seqlens`.
        cu_seqlens: [S + 1] int32, see `Packed`; None: a padded batch with its `attention_mask`.
        by_cudnn: whether cuDNN can be asked for it; all samples then have `max_seqlen` tokens.
        sliding_window: a token sees itself and so many less one before it; None: all before it.

    Returns: [B, T, heads, D], and no attention weights.
    """
    if cu_seqlens is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    key, value = (_all_heads(heads, query.shape[1]) for heads in (key, value))
    whole = sliding_window is None or sliding_window >= max_seqlen
    if by_cudnn and whole and query.dtype != torch.float32 and query.shape[-1] in HEAD_SIZES:
        query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = dense_attention(query, key, value, len(cu_seqlens) - 1, scale)
    elif query.is_cuda and query.dtype != torch.float32:
        left = -1 if sliding_window is None else sliding_window - 1
        query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
        output = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=scaling,
            window_size=(left, 0),
        )
    else:
        output = _row_by_row(query[0], key[0], value[0], cu_seqlens, scaling, sliding_window)
    return output.unsqueeze(0), None


def _all_heads(heads: Tensor, count: int) -> Tensor:
    """Keys or values repeated for every query head that shares them."""
    return heads if heads.shape[1] == count else heads.repeat_interleave(count // heads.shape[1], dim=1)


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """The same by SDPA, a sample a row, padded on the right. Args: [heads, N, D] each. Returns: [N, heads, D]."""
    lengths = cu_seqlens.diff()
    place = torch.arange(int(lengths.max()), device=query.device)
    real = place < lengths.unsqueeze(1)
    index = (cu_seqlens[:-1].unsqueeze(1) + place).clamp(max=query.shape[1] - 1)
    query, key, value = (heads[:, index].transpose(0, 1) for heads in (query, key, value))
    if window is None or window >= len(place):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        distance = place.unsqueeze(1) - place
        seen = (distance >= 0) & (distance < window)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output.transpose(1, 2)[real]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
