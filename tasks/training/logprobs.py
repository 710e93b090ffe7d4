"""Log-probabilities and entropy of tokens, in fp32 whatever precision the logits have."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature).

    Args:
        logits: [..., V], any float type.
        tokens: [...] int64.
        temperature: as used when sampling; the policy that PPO optimises is the tempered one, so it enters every
            log-probability (N+ implementation details of RLHF with PPO, Huang et al. 2024).

    Returns: [...] fp32.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature). Args: logits [..., V]. Returns: [...] fp32."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logp.exp() * logp).sum(-1)
