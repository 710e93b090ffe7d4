"""The loop that SFT and the reward model share: optimizer steps over shuffled rows, checkpoints, a last evaluation."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from tasks.config import TrainConfig
from tasks.training import checkpoint
from tasks.training.batches import check_batch, optimizer_batch
from tasks.training.job import Job, NotFiniteError, Stopped
from tasks.training.packing import own_rows
from tasks.training.ranks import all_sum, any_rank
from tasks.training.types import Engine, Micro

Rows = Sequence[Mapping[str, Any]]


def steps_of(config: TrainConfig, rows: int, where: str) -> int:
    """Optimizer steps of a stage. Raises ValueError if the rows make no batch."""
    check_batch(config.batch_size, rows, f"{where}.batch_size")
    steps = config.epochs * (rows // config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def own_share(rows: Rows, tokens_of: Callable[[Mapping[str, Any]], int], budget: int) -> list[Rows]:
    """This rank's rows, in micro-batches of at most `budget` tokens; every rank has equally many of these."""
    return [[rows[index] for index in part] for part in own_rows([tokens_of(row) for row in rows], budget)]


def fit(
    job: Job,
    config: TrainConfig,
    engine: Engine,
    table: datasets.Dataset,
    collate: Callable[[Rows], Micro],
    tokens_of: Callable[[Mapping[str, Any]], int],
    loss_of: Callable[[Micro], Tensor],
    weight_of: Callable[[Micro], Tensor],
    seed: int,
) -> None:
    """Train `engine` for all its steps, from its newest checkpoint if there is one.

    Args:
        collate: rows of one micro-batch -> its batch.
        tokens_of: a row -> the tokens that it takes in a micro-batch.
        loss_of: batch -> the sum of its losses, scalar.
        weight_of: batch -> what that sum is divided by (its tokens, or the weights of its pairs), scalar.

    Raises Stopped after a checkpoint when asked to stop, NotFiniteError when the loss is no number.
    """
    steps = steps_of(config, len(table), job.stage)
    resumed = checkpoint.load(job.checkpoints, {"model": engine})
    begin = resumed[0] if resumed else 0
    for step in range(begin, steps):
        started = time.perf_counter()
        rows = table.select(optimizer_batch(step, len(table), config.batch_size, seed)).to_list()
        batches = [collate(part) for part in own_share(rows, tokens_of, config.micro_batch_tokens)]
        metrics = _step(job, engine, batches, loss_of, weight_of)
        metrics[f"{job.stage}/samples_per_s"] = config.batch_size / (time.perf_counter() - started)
        job.log(step + 1, metrics)
        job.progress(step + 1, steps, {"loss": metrics[f"{job.stage}/loss"]})
        stop = any_rank(job.should_stop(), job.device)
        if stop or ((step + 1) % config.checkpoint_every == 0 and step + 1 < steps):
            checkpoint.save(job.checkpoints, step + 1, {"model": engine}, {})
        if stop:
            raise Stopped(step + 1)


def _step(
    job: Job,
    engine: Engine,
    batches: Sequence[Micro],
    loss_of: Callable[[Micro], Tensor],
    weight_of: Callable[[Micro], Tensor],
) -> dict[str, float]:
    losses: list[Tensor] = []

    def loss(batch: Micro) -> Tensor:
        total = loss_of(batch)
        losses.append(total.detach())
        return total

    weight = torch.stack([weight_of(batch) for batch in batches]).sum()
    report = engine.optimizer_step(batches, loss, float(weight))
    mean = float(all_sum(torch.stack(losses).sum()) / all_sum(weight))
    if not math.isfinite(mean):
        raise NotFiniteError(
            f"the loss of {job.stage} became {mean} ; lower {job.stage}.optimizer.learning_rate, "
            "or use precision bf16 or fp32"
        )
    return {
        f"{job.stage}/loss": mean,
        f"{job.stage}/grad_norm": report.grad_norm,
        f"{job.stage}/learning_rate": report.learning_rate,
    }
