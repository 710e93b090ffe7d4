"""Per-token estimators of KL(policy || reference) from samples of the policy.

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
