"""Checkpoints in rotation: the last ones stay, a damaged one gives way to the one before it, a kill costs none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import worker
from tasks.training import checkpoint
from tasks.training.types import Engine


class Number:
    """An engine whose state is one number."""

    def __init__(self) -> None:
        self.value = 0

    def save(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.value, folder / "value.pt")

    def load(self, folder: Path) -> None:
        self.value = torch.load(folder / "value.pt")


def saved(folder: Path, steps: list[int], keep: int) -> Any:
    engine: Any = Number()
    for step in steps:
        engine.value = step
        checkpoint.save(folder, step, {"model": engine}, {"seen": step}, keep)
    return engine


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def loaded(folder: Path) -> tuple[int, int, int] | None:
    """Step, engine's state and loop's state."""
    engine: Any = Number()
    engines: dict[str, Engine] = {"model": engine}
    found = checkpoint.load(folder, engines)
    return found and (found[0], engine.value, found[1]["seen"])


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])])
def test_the_last_ones_are_kept_and_the_newest_is_taken(tmp_path: Path, keep: int, left: list[int]) -> None:
    saved(tmp_path, [2, 4, 6, 8], keep)
    assert steps_in(tmp_path) == left
    assert loaded(tmp_path) == (8, 8, 8)


def test_a_damaged_one_gives_way_to_the_one_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, [2, 4, 6], keep=3)
    (tmp_path / "step-00000006" / "rank-0.pt").write_bytes(b"cut short")
    (tmp_path / "step-00000004" / "model" / "value.pt").unlink()
    assert loaded(tmp_path) == (2, 2, 2)
    assert "step-00000006 is damaged (rank-0.pt); the one before it is taken" in capsys.readouterr().err
    assert json.loads((tmp_path / "latest.json").read_text()) == {"step": 2}
    saved(tmp_path, [4], keep=2)
    assert (steps_in(tmp_path), loaded(tmp_path)) == ([2, 4], (4, 4, 4))


def test_the_best_one_stays_as_long_as_one_that_names_it(tmp_path: Path) -> None:
    engine: Any = Number()
    for step, best in [(2, 2), (4, 2), (6, 6), (8, 6), (10, 6)]:
        engine.value = step
        checkpoint.save(tmp_path, step, {"model": engine}, {"seen": step}, keep=2, best=best)
        if step == 6:
            assert steps_in(tmp_path) == [2, 4, 6]
    assert steps_in(tmp_path) == [6, 8, 10]
    checkpoint.load(tmp_path, {"model": engine}, 6)
    assert engine.value == 6
    assert loaded(tmp_path) == (10, 10, 10)
    (tmp_path / "step-00000006" / "model" / "value.pt").unlink()
    with pytest.raises(ValueError, match="is undamaged; start the stage afresh with --force"):
        checkpoint.load(tmp_path, {"model": engine}, 6)


def test_where_all_are_damaged_the_stage_starts_afresh_by_hand(tmp_path: Path) -> None:
    saved(tmp_path, [2], keep=2)
    (tmp_path / "step-00000002" / "rank-0.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is undamaged; start the stage afresh with --force"):
        loaded(tmp_path)


@pytest.mark.parametrize("broken", ["_seal", "_write", "_drop"])
def test_a_kill_at_any_moment_of_writing_costs_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    saved(tmp_path, [2, 4], keep=2)

    def killed(*arguments: Any) -> None:
        if broken == "_drop":  # the oldest one, after the new one is there
            if arguments[0].name != "step-00000002":
                return
            (arguments[0] / "whole.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, broken, killed)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, [6], keep=2)
    assert loaded(tmp_path) == ((6, 6, 6) if broken == "_drop" else (4, 4, 4))
    saved(tmp_path, [6, 8], keep=2)
    assert (steps_in(tmp_path), loaded(tmp_path)) == ([6, 8], (8, 8, 8))


def test_the_curve_goes_on_from_the_checkpoint_that_was_undamaged(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    rows = worker.MetricRows(tmp_path)
    for step in range(1, 6):
        rows.append(step, {"loss": 1.0})
    saved(tmp_path / "checkpoints", [2, 4], keep=2)
    (tmp_path / "checkpoints" / "step-00000004" / "rank-0.pt").unlink()
    rows = worker.MetricRows(tmp_path)
    assert loaded(tmp_path / "checkpoints") == (2, 2, 2)
    rows.append(3, {"loss": 0.5})
    lines = [json.loads(line) for line in rows.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] == 0.5


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, [2, 4], keep=2)
    sealed = tmp_path / "step-00000004" / "whole.json"
    sealed.write_text(json.dumps(json.loads(sealed.read_text()) | {"world_size": 2}))
    with pytest.raises(ValueError, match="was written by 2 processes, this run has 1"):
        loaded(tmp_path)
    shutil.rmtree(tmp_path / "step-00000004")
    assert loaded(tmp_path) == (2, 2, 2)
