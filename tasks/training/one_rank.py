"""DeepSpeed's optimizer for bf16 with fp32 master weights, on one rank, in fewer passes over the gradients.

DeepSpeed casts each gradient to fp32, adds it to zeros, casts the sum to bf16 and back for a reduction over ranks,
scales it by 1 / ranks and by the clipping, sums its squares, lets Adam read it, and sets it to zero twice: 88 bytes of
traffic a parameter and step. On one rank there is no one to reduce with, the first gradient can overwrite the last
step's, and Adam can clip as it reads and write the bf16 weights as it writes the master weights: 40 bytes, or 34 where
a step has one micro-batch, whose gradients stay the bf16 that they are. What is saved in checkpoints stays DeepSpeed's.
"""

import math
from functools import cached_property
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


class OneRankOptimizer(BF16_Optimizer):
    """Takes the place of the optimizer of an engine; see `take_over`."""

    alone = False
    """Whether the step's micro-batch is its only one, so that no gradients are added up."""

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """DeepSpeed tells it before each micro-batch whether the step's last one comes."""
        self.alone = is_boundary and not any(map(any, self.fp32_groups_has_gradients))

    @cached_property
    def _bf16_gradients_flat(self) -> list[Tensor]:
        """The flat buffers for gradients, their first half taken as bf16."""
        return [flat.view(torch.bfloat16)[: len(flat)] for flat in self.fp32_groups_gradients_flat]

    @cached_property
    def _bf16_gradients(self) -> list[list[Tensor]]:
        return [
            self._split_flat_tensor(flat, [weights.numel() for weights in group])
            for flat, group in zip(self._bf16_gradients_flat, self.bf16_groups, strict=True)
        ]

    @property
    def _gradients_flat(self) -> list[Tensor]:
        return self._bf16_gradients_flat if self.alone else self.fp32_groups_gradients_flat

    @property
    def _gradients(self) -> list[list[Tensor]]:
        return self._bf16_gradients if self.alone else self.fp32_groups_gradients

    @torch.no_grad()
    def _update_hp_grad(self, lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Called after each parameter's gradient is made."""
        if lp.grad is None:
            return
        total, gradient = self._gradients[group_idx][param_idx], lp.grad.reshape(-1)
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
        for group, made, flat in zip(
            self._gradients, self.fp32_groups_has_gradients, self._gradients_flat, strict=True
        ):
            flat[sum(map(len, group)) :].zero_()  # DeepSpeed's padding, where the other kind of gradients may lie
            for gradient, is_made in zip(group, made, strict=True):
                if not is_made:
                    gradient.zero_()
        norms = torch.stack([torch.linalg.vector_norm(flat, dtype=torch.float32) for flat in self._gradients_flat])
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
            self._gradients_flat,
            self.bf16_groups_flat,
            strict=True,
        )
        if self.bf16_groups_flat[0].is_cuda:
            for group, master, gradient, weights in flats:
                self._adam(group, master, gradient, weights, clipping)
        else:
            for _, master, gradient, _ in flats:
                master.grad = gradient.float().mul_(clipping)
            self.optimizer.step()
            for master, weights in zip(self.fp32_groups_flat_partition, self.bf16_groups_flat, strict=True):
                weights.copy_(master)
        self._lazy_init_hp_params_optimizer_state()

    def _adam(self, group: dict[str, Any], master: Tensor, gradient: Tensor, weights: Tensor, clipping: float) -> None:
        from tasks.training.adam_triton import adam

        state = self.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        state["step"] += 1
        adam(
            master.data,
            state["exp_avg"],
            state["exp_avg_sq"],
            gradient,
            weights.data,
            step=int(state["step"]),
            clipping=clipping,
            rate=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            decay=group["weight_decay"],
        )


def take_over(engine: Any) -> None:
    """Let a DeepSpeed engine of one rank step by `OneRankOptimizer`, if its optimizer is the one for bf16."""
    if type(engine.optimizer) is not BF16_Optimizer:
        return
    engine.optimizer.__class__ = OneRankOptimizer
    engine.enable_backward_allreduce = False
