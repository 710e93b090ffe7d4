"""A rank that has done its work while gloo's threads still hold some. Run by a test, once per rank."""

import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
kept = dist.group.WORLD, [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(60)]
del kept
sys.exit(7)
