"""The loop of SFT and the reward model on plain torch: evaluations, best weights, early stop, checkpoints by time."""

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_prep import trained
from data_prep.splits import EVAL_KEYS, KEYS_SCHEMA
from data_prep.tables import write_table
from data_prep.tokenise import SCHEMAS
from tasks.config import ConfigError, RewardConfig, SFTConfig, parse
from tasks.shapes import peak_flops, shape_of, work_of
from tasks.training import checkpoint, supervised
from tasks.training.job import Job, Stopped
from tasks.training.reward import _summary, calibration_error, quantiles, wilson, within
from tasks.training.types import StepReport

CPU = torch.device("cpu")
ROWS = datasets.Dataset.from_dict({"tokens": [1] * 8})


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))


class CountingEngine:
    """Its one weight is the number of steps taken."""

    device = CPU

    def __init__(self) -> None:
        self.module = Counter()

    def optimizer_step(self, micro_batches: list, loss_of: Any, denominator: float) -> StepReport:
        total = sum(float(loss_of(batch)) for batch in micro_batches)
        with torch.no_grad():
            self.module.steps += 1
        return StepReport(0.0, 0.0, loss=total / denominator)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.module.state_dict(), folder / "weights.pt")

    def load(self, folder: Path) -> None:
        self.module.load_state_dict(torch.load(folder / "weights.pt"))


def fit(
    tmp_path: Path, losses: list[float], stop_at: int | None = None, killed_at: int | None = None, **config: Any
) -> tuple[Any, dict, list[dict]]:
    """Eight steps whose evaluations find these losses -> engine, result and metrics."""
    engine, rows = CountingEngine(), []

    def progress(step: int, *others: Any) -> None:
        if step == killed_at:
            raise KeyboardInterrupt

    job = Job(
        stage="sft",
        directory=tmp_path,
        config={},
        inputs={},
        device=CPU,
        log=lambda step, metrics: rows.append({"step": step, **metrics}),
        progress=progress,
        should_stop=lambda: stop_at is not None and int(engine.module.steps) == stop_at,
    )
    settings = SFTConfig(batch_size=1, **config)

    def zero(_: Any) -> Tensor:
        return torch.zeros(())

    def one(_: Any) -> float:
        return 1.0

    def evaluate() -> dict[str, float]:
        return {"loss": float(losses[int(engine.module.steps) - 1])}

    result = supervised.fit(
        job, settings, engine, ROWS, lambda part: part, lambda row: row["tokens"], zero, one, evaluate, 0
    )
    return engine, result, rows


def test_evaluations_come_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    engine, result, rows = fit(tmp_path, [8, 7, 6, 5, 4, 3, 2, 1], eval_every=3)
    assert {row["step"]: row["sft/eval_loss"] for row in rows if "sft/eval_loss" in row} == {3: 6.0, 6: 3.0, 8: 1.0}
    assert result == {"steps": 8}
    assert int(engine.module.steps) == 8


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    engine, result, _ = fit(tmp_path, [8, 7, 6, 1, 4, 3, 2, 2], eval_every=2, keep_best=True)
    assert result == {"steps": 8, "best_step": 4}
    assert int(engine.module.steps) == 4


def test_training_ends_when_it_no_longer_helps(tmp_path: Path) -> None:
    _, result, _ = fit(tmp_path, [3, 1, 2, 2, 2, 0, 0, 0], eval_every=1, patience=3)
    assert result == {"steps": 5}


def test_best_and_patience_outlive_a_stop(tmp_path: Path) -> None:
    losses = [3, 1, 2, 2, 2, 0, 0, 0]
    with pytest.raises(Stopped):
        fit(tmp_path, losses, stop_at=3, eval_every=1, patience=3, keep_best=True)
    engine, result, rows = fit(tmp_path, losses, eval_every=1, patience=3, keep_best=True)
    assert [row["step"] for row in rows] == [4, 5]
    assert result == {"steps": 5, "best_step": 2}
    assert int(engine.module.steps) == 2


@pytest.mark.parametrize("killed_at", [4, 5, 7])
def test_a_run_that_goes_on_otherwise_keeps_the_weights_that_it_reports(tmp_path: Path, killed_at: int) -> None:
    how: dict[str, Any] = {"eval_every": 1, "keep_best": True, "checkpoint_every": 3, "keep_checkpoints": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, [8, 7, 9, 5, 9, 9, 9, 9], killed_at=killed_at, **how)
    engine, result, _ = fit(tmp_path, [9] * 8, **how)
    assert result["best_step"] == (2 if killed_at == 4 else 4)
    assert int(engine.module.steps) == result["best_step"]


def test_the_best_of_an_older_checkpoint_is_there_where_the_newest_is_damaged(tmp_path: Path) -> None:
    how: dict[str, Any] = {"eval_every": 1, "keep_best": True, "checkpoint_every": 3, "keep_checkpoints": 2}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, [8, 7, 9, 9, 5, 9, 9, 9], killed_at=6, **how)
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").glob("step-*")) == ["2", "3", "5"]
    (tmp_path / "checkpoints" / "step-00000005" / "rank-0.pt").unlink()
    engine, result, _ = fit(tmp_path, [9] * 8, **how)
    assert (result["best_step"], int(engine.module.steps)) == (2, 2)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    nan = math.nan
    engine, result, _ = fit(tmp_path / "a", [nan, 2, nan, nan, 3, 3, 3, 3], eval_every=1, keep_best=True, patience=3)
    assert result == {"steps": 5, "best_step": 2}
    assert int(engine.module.steps) == 2
    engine, result, _ = fit(tmp_path / "b", [nan] * 8, eval_every=1, keep_best=True)
    assert result == {"steps": 8, "best_step": 8}
    assert int(engine.module.steps) == 8


def test_checkpoints_come_by_minutes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))  # seconds; the loop looks once at the start, once a step, once a checkpoint
    monkeypatch.setattr(supervised.time, "monotonic", lambda: float(next(clock)))
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, *others: saved.append(step))
    fit(tmp_path, [0] * 8, checkpoint_minutes=1, checkpoint_every=100)
    assert saved == [3, 6]


def test_keeping_the_best_needs_evaluations() -> None:
    with pytest.raises(ConfigError, match="sft: keep_best needs eval_every"):
        parse({"sft": {"keep_best": True}})


def test_a_model_is_not_judged_on_what_its_base_was_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": [n], "chosen": [1], "rejected": [2], "group": f"g{n}"} for n in range(5)]
    write_table(rows, tmp_path / "reward-eval.arrow", SCHEMAS["reward"])
    held_out = [{"group": f"g{n}", "keys": [n, 10 + n]} for n in range(5)]
    write_table(held_out, tmp_path / EVAL_KEYS, KEYS_SCHEMA)
    inputs = {"data": tmp_path, "split": tmp_path, "base": tmp_path}
    job = Job("reward", tmp_path, {}, inputs, CPU, lambda *_: None, lambda *_: None, lambda: False)
    assert supervised.held_out(job, 3)["group"] == ["g0", "g1", "g2"]
    trained.keep(tmp_path, [], np.array([0, 13], np.uint64))
    assert supervised.held_out(job, 3)["group"] == ["g1", "g2", "g4"]
    trained.keep(tmp_path, [], np.arange(5, dtype=np.uint64))
    with pytest.raises(ValueError, match=r"were trained on every held-out prompt: add rows that are new"):
        supervised.held_out(job, 3)


def test_wilsons_interval_equals_its_published_values() -> None:
    # Newcombe 1998, table I, method 3.
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, count), interval in known.items():
        assert wilson(hits / count, count) == pytest.approx(interval, abs=1e-4)


def test_calibration_error_of_hand_worked_margins() -> None:
    certain, even = math.log(9), 0.0  # confidences 0.9 and 0.5
    assert calibration_error([certain] * 9 + [-certain]) == pytest.approx(0.0)
    assert calibration_error([certain, -certain]) == pytest.approx(0.4)
    assert calibration_error([even] * 5) == 0.0
    assert calibration_error([certain, -certain, even, even]) == pytest.approx(0.2)
    assert quantiles(list(range(101)))["95%"] == 95


def test_a_model_that_is_as_good_as_length_does_not_beat_it() -> None:
    def row(hit: float, length_hit: float) -> dict[str, Any]:
        return {"source": "s", "chosen": 0.0, "margin": hit - 0.5, "loss": 0.7, "hit": hit, "length_hit": length_hit}

    even = _summary([row(1, 0), row(0, 1), row(1, 1), row(0, 0)] * 25)
    assert even["accuracy"] == even["length_accuracy"] == 0.5
    assert not even["beats_length"]
    better = _summary([row(1, 0), row(1, 1), row(1, 1), row(0, 0)] * 25)
    assert better["beats_length"]
    assert better["accuracy_per_source"] == {"s": 0.75}


def test_work_is_that_of_the_known_formula() -> None:
    shape = shape_of({"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3,
                      "num_attention_heads": 2, "vocab_size": 10})  # fmt: skip
    linear = 3 * (4 * 64 + 3 * 128)
    assert shape.linear == linear
    # 12 x layers x width x length is full attention forward and backward (Chowdhery et al. 2022); causal is half of it.
    assert work_of(shape, [5, 7], True) == 6 * (linear + 80) * 12 + 12 * 3 * 8 * (25 + 49) / 2
    # Of two frozen layers out of three only the forward pass is needed, 2 of 6 FLOPs.
    frozen = 6 * (linear / 3 + 80) * 12 + 2 * linear * 2 / 3 * 12 + (12 + 4 * 2) * 8 * (25 + 49) / 2
    assert work_of(shape, [5, 7], True, frozen_layers=2) == pytest.approx(frozen)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 5090") is None


def test_few_pairs_make_a_batch_for_the_gold_model() -> None:
    assert within(RewardConfig(batch_size=64), 47).batch_size == 47
    assert within(RewardConfig(batch_size=16), 47).batch_size == 16
