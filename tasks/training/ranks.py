"""Sums and votes over all ranks; with one process, or none set up, they are the value itself."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, a new tensor."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank."""
    if world_size() == 1:
        return flag
    return bool(all_sum(torch.tensor(int(flag), device=device)))


def gather_rows(rows: list[dict]) -> list[dict]:
    """The rows of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return rows
    parts: list[list[dict] | None] = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts if part for row in part]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
