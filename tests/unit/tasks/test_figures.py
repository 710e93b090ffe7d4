import io
import json
from pathlib import Path

import pytest

from tasks import figures


def stage(directory: Path, rows: list[dict[str, float]], end: str = "") -> Path:
    (directory / "records").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "records" / "metrics.jsonl").write_text(text + end)
    return directory


def test_line_cut_short_by_a_kill_is_left_out(tmp_path):
    rows = [{"step": 1, "sft/loss": 2.0}, {"step": 2, "sft/loss": 1.0}]
    assert figures.read_rows(stage(tmp_path, rows, end='{"step": 3, "sft/l')) == rows


def test_no_curves_without_metrics(tmp_path):
    assert figures.read_rows(tmp_path) == []
    assert figures.curves({"sft": tmp_path, "reward": stage(tmp_path / "r", [])}) is None


def pixels(png: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(png))


def test_curves_are_a_png_that_grows_with_the_stages(tmp_path):
    sft = stage(tmp_path / "sft", [{"step": n, "sft/loss": 1 / n} for n in range(1, 30)])
    names = ("reward", "reward_std", "kl", "answer_tokens", "policy_loss", "value_loss", "entropy")
    ppo = stage(tmp_path / "ppo", [{"step": n} | {f"ppo/{name}": n / 10 for name in names} for n in range(1, 9)])
    small, large = pixels(figures.curves({"sft": sft})), pixels(figures.curves({"sft": sft, "ppo": ppo}))
    assert small.format == large.format == "PNG"
    assert large.height > small.height


def test_every_panel_can_be_drawn_of_one_step(tmp_path):
    metrics = {panel.metric for panel in figures.PANELS} | {panel.band for panel in figures.PANELS if panel.band}
    row = {"step": 1} | dict.fromkeys(metrics | set(figures.HELD_OUT.values()), 0.5)
    directory = stage(tmp_path, [row])
    assert pixels(figures.curves(dict.fromkeys(("sft", "reward", "ppo"), directory))).width > 1000


def test_value_that_is_no_number_leaves_the_rest_of_the_curve(tmp_path):
    rows = [{"step": 1, "sft/loss": 2.0}, {"step": 2, "sft/loss": float("nan")}, {"step": 3, "sft/loss": 1.0}]
    assert figures.series(figures.read_rows(stage(tmp_path, rows)), "sft/loss") == ([1, 3], [2.0, 1.0])


def test_smoothing_keeps_a_line_and_calms_noise():
    line = [float(n) for n in range(100)]
    assert figures.smoothed(line)[:90] == pytest.approx(line[:90])
    noisy = [1.0, -1.0] * 50
    assert max(abs(value) for value in figures.smoothed(noisy)[10:]) < 0.2
    assert figures.smoothed([3.0]) == [3.0]
    assert figures.smoothed([]) == []


def test_both_rewards_are_drawn_over_kl_where_a_gold_model_scored(tmp_path):
    sft = stage(tmp_path / "sft", [{"step": 1, "sft/loss": 1.0}])
    pools = [{"step": n, "kl": n / 2, "reward": float(n), "gold": 3 - n / 4} for n in range(6)]
    (tmp_path / "evaluate").mkdir()
    path = tmp_path / "evaluate" / "pools.jsonl"
    path.write_text("".join(json.dumps(pool) + "\n" for pool in pools))
    assert figures.read_pools(path.parent) == pools
    with_pools = figures.curves({"sft": sft, "evaluate": path.parent})
    assert pixels(with_pools).tobytes() != pixels(figures.curves({"sft": sft})).tobytes()
    path.write_text(json.dumps({"step": 1, "kl": 0.5, "reward": 1.0}) + "\n")
    assert figures.read_pools(path.parent) == []
    assert figures.read_pools(tmp_path / "none") == []
