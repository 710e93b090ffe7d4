"""Exponential moving average of a network's trained weights, on each rank's own part of them.

DeepSpeed-Chat gathers every parameter to average it, and under ZeRO-3 its gather loses what was written. Here a rank
averages what it holds, in fp32: its partition under ZeRO-3, the whole network otherwise. Nothing is sent until the
average is exported. The decay is per optimizer step (DeepSpeed-Chat's is per micro-batch).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.training.ranks import rank, world_size


class Ema:
    """shadow <- decay x shadow + (1 - decay) x weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._shadow = [own_part(parameter).float().clone() for parameter in self._parameters.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        weights = [own_part(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(self._shadow, weights, 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> its whole average on the CPU, on rank 0; empty tensors on the others. All ranks call it."""
        return {
            name: _whole(parameter, shadow)
            for (name, parameter), shadow in zip(self._parameters.items(), self._shadow, strict=True)
        }

    def state(self) -> list[Tensor] | None:
        """What a checkpoint of this rank keeps; None where it is the same as rank 0's."""
        return [shadow.cpu() for shadow in self._shadow] if self._is_partitioned or rank() == 0 else None

    def load(self, state: list[Tensor] | None) -> None:
        """Go on from `state`. All ranks call it."""
        for index, shadow in enumerate(self._shadow):
            if state is not None:
                shadow.copy_(state[index])
            if world_size() > 1 and not self._is_partitioned:
                dist.broadcast(shadow, 0)

    @property
    def _is_partitioned(self) -> bool:
        return any(hasattr(parameter, "ds_tensor") for parameter in self._parameters.values())


def own_part(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its partition (flat, padded) under ZeRO-3, else all of it."""
    part = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    assert isinstance(part, Tensor)
    return part.detach()


def _whole(parameter: Any, shadow: Tensor) -> Tensor:
    if hasattr(parameter, "ds_tensor"):
        shadow = shadow.to(parameter.device)  # an offloaded part lies where NCCL does not reach
        parts = [torch.empty_like(shadow) for _ in range(world_size())]
        dist.all_gather(parts, shadow)
        shadow = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    return shadow.cpu() if rank() == 0 else torch.empty(0)
