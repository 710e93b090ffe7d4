"""Per-token estimators of KL(policy || reference) from samples of the policy, and the penalty's adaptive weight.

From J. Schulman, "Approximating KL divergence" (2020): with the log-ratio d = log p_reference - log p_policy,
k1 = -d is unbiased, k2 = d^2 / 2 has less variance, k3 = exp(d) - 1 - d is unbiased and never negative.
"""

from typing import Literal

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""exp() is taken of log-ratios within this limit only: e^20 is far beyond any useful penalty, inf would end the run."""


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate in nats. Args: logprobs, reference: [...] fp32 of the same tokens. Returns: [...] fp32."""
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() - 1 - log_ratio


def adapted_kl_coef(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The weight of the KL penalty after a rollout, drawn to where the KL meets its target.

    Ziegler et al. 2019, section 2.2: proportional control in log space, the relative error clipped to 0.2.

    Args:
        coef: the weight so far.
        kl: measured nats per answer.
        target: wanted nats per answer.
        samples: answers of the rollout.
        horizon: answers over which a clipped error changes the weight by about a fifth.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * samples / horizon)
