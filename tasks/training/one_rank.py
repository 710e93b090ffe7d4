"""DeepSpeed's optimizer for bf16 with fp32 master weights, on one rank, in fewer passes over the gradients.

DeepSpeed casts each gradient to fp32, adds it to zeros, casts the sum to bf16 and back for a reduction over ranks,
scales it by 1 / ranks and by the clipping, sums its squares, lets Adam read it, and sets it to zero twice: 88 bytes of
traffic a parameter and step. On one rank there is no one to reduce with, the first gradient can overwrite the last
step's, and Adam can clip as it reads and write the bf16 weights as it writes the master weights: 40 bytes. What is
saved in checkpoints stays DeepSpeed's.
"""

import math
from functools import cache
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


class OneRankOptimizer(BF16_Optimizer):
    """Takes the place of the optimizer of an engine; see `take_over`."""

    compiled = False
    """Whether Adam is one compiled kernel; otherwise it is torch's own, after clipping."""

    @torch.no_grad()
    def _update_hp_grad(self, lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Called after each parameter's gradient is made."""
        if lp.grad is None:
            return
        total, gradient = self.fp32_groups_gradients[group_idx][param_idx], lp.grad.reshape(-1)
        if self.fp32_groups_has_gradients[group_idx][param_idx]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        lp._hp_grad = total  # type: ignore[attr-defined]  # where DeepSpeed looks for it
        self.fp32_groups_has_gradients[group_idx][param_idx] = True

    def clear_hp_grads(self) -> None:
        """Forget the gradients; the next ones overwrite them."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Waits for the gradients' norm; the update itself is left to the GPU."""
        for group, made in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for gradient, is_made in zip(group, made, strict=True):
                if not is_made:
                    gradient.zero_()
        norms = torch.stack([torch.linalg.vector_norm(flat) for flat in self.fp32_groups_gradients_flat])
        self._global_grad_norm = float(torch.linalg.vector_norm(norms))
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            clipping = min(1.0, self.clip_grad / (self._global_grad_norm + 1e-6)) if self.clip_grad > 0 else 1.0
            self._update(clipping)
        self.clear_hp_grads()

    def _update(self, clipping: float) -> None:
        flats = zip(
            self.optimizer.param_groups,
            self.fp32_groups_flat_partition,
            self.fp32_groups_gradients_flat,
            self.bf16_groups_flat,
            strict=True,
        )
        if self.compiled:
            for group, master, gradient, weights in flats:
                self._adam(group, master, gradient, weights, clipping)
        else:
            for _, master, gradient, _ in flats:
                master.grad = gradient.mul_(clipping) if clipping < 1 else gradient
            self.optimizer.step()
            for master, weights in zip(self.fp32_groups_flat_partition, self.bf16_groups_flat, strict=True):
                weights.copy_(master)
        self._lazy_init_hp_params_optimizer_state()

    def _adam(self, group: dict[str, Any], master: Tensor, gradient: Tensor, weights: Tensor, clipping: float) -> None:
        state = self.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        state["step"] += 1
        # On the GPU, since a number that changed would be compiled anew.
        factors = torch.tensor(factors_of(group, float(state["step"]), clipping), device=master.device)
        _compiled_adam()(
            master.data,
            state["exp_avg"],
            state["exp_avg_sq"],
            gradient,
            weights.data,
            factors,
            *group["betas"],
            group["eps"],
        )


def take_over(engine: Any, compiled: bool) -> None:
    """Let a DeepSpeed engine of one rank step by `OneRankOptimizer`, if its optimizer is the one for bf16."""
    if type(engine.optimizer) is not BF16_Optimizer:
        return
    engine.optimizer.__class__ = OneRankOptimizer
    engine.optimizer.compiled = compiled
    engine.enable_backward_allreduce = False


def adam(
    master: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    weights: Tensor,
    factors: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of AdamW as torch's (Loshchilov & Hutter 2019, algorithm 2), in place.

    Args:
        master, mean, square: [N] fp32, changed; weights: [N] bf16, the new master weights.
        gradient: [N] fp32.
        factors: [4] fp32, of `factors_of`.
    """
    clipped = gradient * factors[0]
    mean.lerp_(clipped, 1 - beta1)
    square.mul_(beta2).add_(clipped * clipped * (1 - beta2))
    master.copy_(master * factors[1] - factors[2] * mean / (square.sqrt() / factors[3] + eps))
    weights.copy_(master)


def factors_of(group: dict[str, Any], steps: float, clipping: float) -> list[float]:
    """What changes from step to step: clipping; 1 - rate x decay; rate / (1 - beta1^steps); (1 - beta2^steps)^1/2."""
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    return [clipping, 1 - rate * group["weight_decay"], rate / (1 - beta1**steps), (1 - beta2**steps) ** 0.5]


@cache
def _compiled_adam() -> Any:
    return torch.compile(adam)
