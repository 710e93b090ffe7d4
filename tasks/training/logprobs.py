"""Log-probabilities and entropy of tokens, in fp32 whatever precision the logits have.

For training they are made from the last hidden states, in chunks of tokens: the logits of all tokens are never held at
once, neither forward nor, where they are computed again, backward. For 16 k tokens of a vocabulary of 49 k those would
be 3 GiB in fp32, several times over.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_LOGITS = 2**26
"""Logits of one chunk: 256 MiB in fp32. Compiled chunks have four times as many: none of theirs are written in fp32."""


class TokenScores(NamedTuple):
    """Both of the shape of the tokens, fp32."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature).

    Args:
        logits: [..., V], any float type.
        tokens: [...] int64.
        temperature: as used when sampling; the policy that PPO optimises is the tempered one, so it enters every
            log-probability (N+ implementation details of RLHF with PPO, Huang et al. 2024).

    Returns: [...] fp32.
    """
    scaled = _full_precision(logits) / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature). Args: logits [..., V]. Returns: [...] fp32."""
    logp = torch.log_softmax(_full_precision(logits) / temperature, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def scores_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    compiled: bool = False,
) -> TokenScores:
    """`token_logprobs` (and `token_entropy`, without gradient) of logits = hidden @ weight.T + bias, a chunk at a time.

    Args:
        hidden: [..., D], the state from which each token was predicted.
        weight: [V, D] and bias: [V], of the language model's head.
        tokens: [...] int64.
        compiled: fuse what is done to the logits into few passes over them; the first call compiles.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs, entropy = _ChunkedScores.apply(
        flat, weight, bias, tokens.reshape(-1), temperature, with_entropy, compiled
    )
    return TokenScores(logprobs.view(tokens.shape), entropy.view(tokens.shape) if with_entropy else None)


class _ChunkedScores(torch.autograd.Function):
    """Forward keeps the hidden states and one number per token; backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        with_entropy: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs, normalisers, entropies = [], [], []
        scored = _compiled(_scored) if compiled else _scored
        for part in _chunks(hidden, weight, compiled):
            logits = _logits(hidden[part], weight, bias)
            logprob, normaliser = scored(logits, tokens[part], temperature)
            logprobs.append(logprob)
            normalisers.append(normaliser)
            if with_entropy:
                entropies.append(token_entropy(logits, temperature))
        ctx.save_for_backward(hidden, weight, bias, tokens, torch.cat(normalisers))
        ctx.temperature, ctx.compiled = temperature, compiled
        entropy = torch.cat(entropies) if with_entropy else None
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, normalisers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over chunks in full precision: in bf16 each further chunk would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(bias)) if needs_bias else None
        logit_gradient = _compiled(_logit_gradient) if ctx.compiled else _logit_gradient
        for part in _chunks(hidden, weight, ctx.compiled):
            logits = _logits(hidden[part], weight, bias)
            grad = logit_gradient(logits, tokens[part], normalisers[part], gradient[part], ctx.temperature)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=grad_bias.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _chunks(hidden: Tensor, weight: Tensor, compiled: bool) -> list[slice]:
    size = max(1, CHUNK_LOGITS * (4 if compiled else 1) // len(weight))
    return [slice(begin, begin + size) for begin in range(0, max(1, len(hidden)), size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


def _scored(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens and the logarithms of the softmax's denominators. [M, V], [M] -> [M] each."""
    scaled = _full_precision(logits) / temperature
    normaliser = scaled.logsumexp(-1)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - normaliser, normaliser


def _logit_gradient(logits: Tensor, tokens: Tensor, normaliser: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """d log p(token) / d logits = (one-hot - softmax) / temperature, times what comes from above. Returns: [M, V]."""
    probabilities = (_full_precision(logits) / temperature - normaliser.unsqueeze(-1)).exp()
    chosen = torch.arange(logits.shape[-1], device=logits.device) == tokens.unsqueeze(-1)
    return ((chosen.to(probabilities.dtype) - probabilities) * (gradient / temperature).unsqueeze(-1)).to(logits.dtype)


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor))


def _wide(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)
