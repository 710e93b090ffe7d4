"""Rewards per token, generalised advantage estimation, whitening. Masked slots may hold anything, NaN included."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every answer token: the KL penalty on each, the score of the whole answer on its last.

    The score stands at the action that ended the answer (EOS, or the last token before the limit), the convention of
    OpenRLHF, verl and NeMo RL; TRL and DeepSpeed-Chat put it one step later.

    Args:
        scores: [B] fp32, one score per answer.
        kl: [B, R] fp32, per-token KL estimate.
        mask: [B, R] bool, True on answer tokens, a prefix of each row.

    Returns: [B, R] fp32, 0 where masked.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    is_last = positions == mask.sum(1, keepdim=True) - 1
    rewards = -kl_coef * kl + torch.where(is_last, scores.unsqueeze(1), 0.0)
    return torch.where(mask, rewards, 0.0)


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of all scores so far."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased; 1 until there are two scores that differ."""
        variance = self.squares / (self.number - 1) if self.number > 1 else 0.0
        return variance**0.5 if variance > 1e-12 else 1.0

    def with_scores(self, scores: Tensor, all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> "Moments":
        """The moments with all ranks' new scores, [B], in them (Chan, Golub and LeVeque 1983, equation 2.1)."""
        values = scores.double()
        count, total = (float(x) for x in all_sum(torch.stack([torch.ones_like(values).sum(), values.sum()])))
        mean = total / count
        squares = float(all_sum((values - mean).square().sum()))
        whole = self.number + count
        difference = mean - self.mean
        return Moments(
            whole,
            self.mean + difference * count / whole,
            self.squares + squares + difference**2 * self.number * count / whole,
        )


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, equations 16 and 18).

    An answer is an episode that ends with its last token: the value after it is 0. Returns are advantage + value,
    taken before any whitening.

    Args:
        rewards, values: [B, R] fp32; what stands in masked slots is ignored.
        mask: [B, R] bool, True on answer tokens, a prefix of each row.

    Returns: advantages and returns, both [B, R] fp32, 0 where masked.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    following = F.pad(values[:, 1:], (0, 1))
    deltas = (rewards + gamma * following - values).T.contiguous()
    running = torch.zeros_like(deltas[0])
    backwards = []
    for delta in reversed(deltas.unbind()):
        running = delta + gamma * lam * running
        backwards.append(running)
    advantages = torch.stack(backwards[::-1], dim=1)
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
    """Values with mean 0 and variance 1 (unbiased) over the unmasked slots of all ranks.

    Args:
        values: [B, R] fp32.
        mask: [B, R] bool.
        all_sum: sums a tensor over all ranks.

    Returns: [B, R] fp32, 0 where masked.
    """
    kept = torch.where(mask, values, 0.0).double()
    count, total = all_sum(torch.stack([mask.sum().double(), kept.sum()]))
    mean = total / count
    centred = torch.where(mask, kept - mean, 0.0)
    variance = all_sum(centred.square().sum()) / (count - 1).clamp(min=1)
    return (centred * torch.rsqrt(variance + 1e-8)).to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> float:
    """1 - Var(returns - values) / Var(returns) over unmasked slots of all ranks; 0 where the returns do not vary."""
    error, target = (returns - values)[mask].double(), returns[mask].double()
    moments = [error.sum(), error.square().sum(), target.sum(), target.square().sum()]
    count, *sums = all_sum(torch.stack([mask.sum().double(), *moments]))
    error_variance = sums[1] / count - (sums[0] / count) ** 2
    variance = sums[3] / count - (sums[2] / count) ** 2
    return float(1 - error_variance / variance) if variance > 1e-12 else 0.0
