"""The loop that SFT and the reward model share: optimizer steps over shuffled rows, evaluations, checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor

from data_prep.tables import read_table
from data_prep.trained import unseen
from tasks.config import ConfigError, TrainConfig
from tasks.shapes import peak_flops, shape_of, work_of
from tasks.training import checkpoint
from tasks.training.batches import check_batch, optimizer_batch
from tasks.training.job import Job, NotFiniteError, Stopped
from tasks.training.models import Policy
from tasks.training.packing import own_rows
from tasks.training.ranks import any_rank, world_size
from tasks.training.types import Engine, Micro

LOG = logging.getLogger(__name__)
Rows = Sequence[Mapping[str, Any]]


def steps_of(config: TrainConfig, rows: int, where: str) -> int:
    """Optimizer steps of a stage. Raises ValueError if the rows make no batch."""
    check_batch(config.batch_size, rows, f"{where}.batch_size")
    steps = config.epochs * (rows // config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def held_out(job: Job, count: int) -> datasets.Dataset:
    """The first `count` held-out rows of the stage's phase, without those whose prompt its base was trained on."""
    table = read_table(job.inputs["data"] / f"{job.phase}-eval.arrow")
    return table.select(unseen(table["group"], [job.inputs["base"]], job.inputs["split"])[:count])


def own_share(rows: Rows, tokens_of: Callable[[Mapping[str, Any]], int], budget: int) -> list[Rows]:
    """This rank's rows, in micro-batches of at most `budget` tokens; every rank has equally many of these."""
    return [[rows[index] for index in part] for part in own_rows([tokens_of(row) for row in rows], budget)]


def eval_share(rows: Rows, tokens_of: Callable[[Mapping[str, Any]], int], budget: int) -> Iterator[tuple[Rows, bool]]:
    """As `own_share`, of any number of rows, and whether a micro-batch counts.

    A rank that has none left passes a row of another's through the network beside the others', and drops the result.
    """
    for part in own_share(rows, tokens_of, budget):
        yield part or rows[:1], bool(part)


class Course(NamedTuple):
    """How training went, as far as a checkpoint has to know it."""

    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0
    """Evaluations since the best one."""


def fit(
    job: Job,
    config: TrainConfig,
    engine: Engine,
    table: datasets.Dataset,
    collate: Callable[[Rows], Micro],
    tokens_of: Callable[[Mapping[str, Any]], int],
    loss_of: Callable[[Micro], Tensor],
    weight_of: Callable[[Micro], float],
    evaluate: Callable[[], Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Train `engine` for its steps, from its newest checkpoint if there is one; it is left with the weights to keep.

    Args:
        collate: rows of one micro-batch -> its batch.
        tokens_of: a row -> the tokens that it takes in a micro-batch.
        loss_of: batch -> the sum of its losses, scalar.
        weight_of: batch -> what that sum is divided by (its tokens, or the weights of its pairs).
        evaluate: -> metrics of the held-out rows, `loss` among them, the same on all ranks.

    Returns: the steps taken, and with `keep_best` the one whose weights are kept. Raises Stopped after a checkpoint
    when asked to stop, NotFiniteError when the loss is no number.
    """
    steps = steps_of(config, len(table), job.stage)
    step, course = 0, Course()
    if resumed := checkpoint.load(job.checkpoints, {"model": engine}):
        step, course = resumed[0], Course(*resumed[1]["course"])
    LOG.info("%s: trains from step %d to %d", job.stage, step, steps)
    saved_at = time.monotonic()
    while step < steps and not _is_over(config, course):
        started = time.perf_counter()
        rows = table.select(optimizer_batch(step, len(table), config.batch_size, seed)).to_list()
        batches = [collate(part) for part in own_share(rows, tokens_of, config.micro_batch_tokens)]
        metrics = _step(job, engine, batches, loss_of, weight_of)
        metrics |= speed(job, engine, [tokens_of(row) for row in rows], time.perf_counter() - started)
        step += 1
        if config.eval_every is not None and (step % config.eval_every == 0 or step == steps):
            found = evaluate()
            metrics |= {f"{job.stage}/eval_{name}": v for name, v in found.items() if isinstance(v, float)}
            course = _after(course, step, found["loss"])
        job.log(step, metrics)
        job.progress(step, steps, {"loss": metrics[f"{job.stage}/loss"]})
        stop = any_rank(job.should_stop(), job.device)
        late = config.checkpoint_minutes is not None and time.monotonic() - saved_at > 60 * config.checkpoint_minutes
        best = course.best_step if config.keep_best else None
        due = step % config.checkpoint_every == 0 or step == best or any_rank(late, job.device)
        if stop or (due and step < steps):
            state = {"course": tuple(course)}
            checkpoint.save(job.checkpoints, step, {"model": engine}, state, config.keep_checkpoints, best)
            saved_at = time.monotonic()
        if stop:
            raise Stopped(step)
    best = course.best_step or step  # the last one where no held-out loss was a number
    if config.keep_best and best != step:
        checkpoint.load(job.checkpoints, {"model": engine}, best)
    LOG.info("%s: trained", job.stage)
    return {"steps": step} | ({"best_step": best} if config.keep_best else {})


def _is_over(config: TrainConfig, course: Course) -> bool:
    return config.patience is not None and course.worse >= config.patience


def _after(course: Course, step: int, loss: float) -> Course:
    """The course after an evaluation. A loss that is no number is no better than any."""
    return Course(loss, step, 0) if loss < course.best_loss else course._replace(worse=course.worse + 1)


def speed(job: Job, engine: Engine, lengths: Sequence[int], took: float) -> dict[str, float]:
    """Samples and tokens a second over all ranks, and on a known GPU the share of its peak that the model's work is.

    The work is 6 x parameters x tokens and causal attention (Chowdhery et al. 2022, appendix B); recomputed layers do
    not count, and of frozen ones the forward pass alone. Embeddings are left out, the language model's head is not.
    """
    found = {f"{job.stage}/samples_per_s": len(lengths) / took, f"{job.stage}/tokens_per_s": sum(lengths) / took}
    if job.device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(job.device))) is not None:
        try:
            shape = shape_of(engine.module.model.config.to_dict())
        except ConfigError:
            return found  # a family whose work is not known
        scores_tokens = isinstance(engine.module, Policy)
        work = work_of(shape, lengths, scores_tokens, job.config[job.stage].get("frozen_layers", 0))
        found[f"{job.stage}/mfu"] = work / took / (peak * world_size())
    return found


def _step(
    job: Job,
    engine: Engine,
    batches: Sequence[Micro],
    loss_of: Callable[[Micro], Tensor],
    weight_of: Callable[[Micro], float],
) -> dict[str, float]:
    report = engine.optimizer_step(batches, loss_of, sum(weight_of(batch) for batch in batches))
    if not math.isfinite(report.loss):
        raise NotFiniteError(
            f"the loss of {job.stage} became {report.loss}; lower {job.stage}.optimizer.learning_rate, "
            "or use precision bf16 or fp32"
        )
    return {
        f"{job.stage}/loss": report.loss,
        f"{job.stage}/learning_rate": report.learning_rate,
        # fp16: a step that overflowed has no gradient and changed nothing.
        **({f"{job.stage}/skipped": 1.0} if report.skipped else {f"{job.stage}/grad_norm": report.grad_norm}),
    }
