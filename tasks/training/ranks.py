"""Sums and votes over all ranks; with one process, or none set up, they are the value itself."""

import os
import sys
from typing import NoReturn

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


def exit_rank(code: int = 0) -> NoReturn:
    """End this process with an exit code; where its group is gloo's, at once, without Python's own clearing up.

    A thread of gloo that still holds a tensor asks then for an interpreter that is gone, and the process aborts though
    all is done: the stage would count as killed. Destroying the group does not help, as DeepSpeed keeps hold of it.
    """
    if not (dist.is_initialized() and dist.get_backend() == "gloo"):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
