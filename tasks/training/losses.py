"""The four losses, as sums: the caller divides by the tokens (or pairs) of the whole optimizer batch.

A mean per micro-batch would weigh a token by how few others share its micro-batch; a sum over the optimizer batch,
divided once, weighs all alike whatever the micro-batch size, accumulation and number of ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.training.kl import LOG_RATIO_LIMIT
from tasks.training.types import PolicyStats


def language_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum of the negative log-likelihood over unmasked tokens, in nats. Args: [B, T] each. Returns: scalar fp32."""
    return -torch.where(mask, logprobs, 0.0).sum()


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, weight: Tensor, centering_coef: float = 0.0, margin: float = 0.0
) -> Tensor:
    """Weighted sum of -log sigmoid(chosen - rejected - margin) (Bradley-Terry; Ouyang et al. 2022, equation 1).

    The margin is that of Touvron et al. 2023 (equation 2), the same for all pairs: our sets grade none.

    Bradley-Terry leaves each prompt's mean score free; `centering_coef` times (chosen + rejected)^2 draws it to zero
    (Eisenstein et al. 2024, equation 2).

    Args: [B] fp32 each. Returns: scalar fp32.
    """
    return (weight * (centering_coef * (chosen + rejected).square() - F.logsigmoid(chosen - rejected - margin))).sum()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate of PPO (Schulman et al. 2017, equation 7), negated, summed over unmasked tokens.

    Args: [B, R] each, fp32; `old_logprobs` and `advantages` carry no gradient.

    Returns: scalar fp32 and the sums of approx. KL (k3), of clipped tokens and of ratios.
    """
    # Where masked the log-ratio is 0 before exp(), not after: inf x 0 would be NaN, and its gradient too.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, advantages, 0.0)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    with torch.no_grad():
        stats = PolicyStats(
            approx_kl=(ratio - 1 - log_ratio).sum(),
            clipped=(((ratio - 1).abs() > clip_range) & mask).sum().float(),
            ratio=torch.where(mask, ratio, 0.0).sum(),
        )
    return torch.where(mask, loss, 0.0).sum(), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error, the worse of the value and the value clipped around the old one, summed over tokens.

    OpenAI baselines' clipped value loss. Args: [B, R] each, fp32. Returns: scalar fp32, number of clipped tokens.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = torch.where(mask, torch.maximum(plain_error, clipped_error), 0.0).sum() / 2
    return loss, ((clipped_error > plain_error) & mask).sum().float().detach()
