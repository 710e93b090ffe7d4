"""The curves of a run as one PNG, from the `records/metrics.jsonl` of its training stages."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import json_lines
from tasks.stages import RECORDS

Rows = Sequence[Mapping[str, float]]

RAW, LINE, GUIDE, INK = "#b8c7dd", "#1f4e8c", "#c2571a", "#333a45"


@dataclass(frozen=True)
class Panel:
    """One metric over the steps of one stage."""

    stage: str
    metric: str
    title: str
    unit: str
    band: str | None = None
    """Metric drawn around the curve as plus and minus."""
    zero: bool = False
    """Mark 0, where it means something."""


PANELS = (
    Panel("sft", "sft/loss", "SFT: loss", "nats per token"),
    Panel("reward", "reward/loss", "Reward model: pairwise loss", "nats per pair"),
    Panel("reward", "reward/accuracy", "Reward model: accuracy", "share of pairs"),
    Panel("ppo", "ppo/reward", "PPO: reward of the answers", "reward model's score", band="ppo/reward_std", zero=True),
    Panel("ppo", "ppo/kl", "PPO: KL to the SFT model", "nats per answer", zero=True),
    Panel("ppo", "ppo/answer_tokens", "PPO: answer length", "tokens"),
    Panel("ppo", "ppo/policy_loss", "PPO: policy loss", "per token", zero=True),
    Panel("ppo", "ppo/value_loss", "PPO: value loss", "squared score"),
    Panel("ppo", "ppo/entropy", "PPO: entropy of the policy", "nats per token"),
)
HELD_OUT = {"sft/loss": "sft/eval_loss", "reward/loss": "reward/eval_loss", "reward/accuracy": "reward/eval_accuracy"}
"""Metric -> the one that is measured on held-out rows after the last step, drawn as a point."""


def read_rows(directory: Path) -> list[dict[str, float]]:
    """The metrics of a stage, a row per step; none where it logs none. A line cut short by a kill is left out."""
    try:
        lines = (directory / RECORDS / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def curves(directories: Mapping[str, Path]) -> bytes | None:
    """The curves of the stages as a PNG; None where no stage has any.

    Args:
        directories: sft, reward, ppo, evaluate -> stage directory, as far as the run went.
    """
    rows = {stage: read_rows(directory) for stage, directory in directories.items()}
    panels = [panel for panel in PANELS if series(rows.get(panel.stage, []), panel.metric)[0]]
    pools = read_pools(directories["evaluate"]) if "evaluate" in directories else []
    return _draw(panels, rows, pools) if panels else None


def read_pools(directory: Path) -> list[dict[str, float]]:
    """What `evaluate` found along PPO's way, a row per pool; nothing where no gold reward model scored it."""
    path = directory / "pools.jsonl"
    return [row for row in json_lines.read_rows(path) if "gold" in row] if path.is_file() else []


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window of about a tenth of the values, centred, so that it does not lag behind a steep curve."""
    reach = len(values) // 20
    parts = []
    for place in range(len(values)):
        near = min(reach, place)  # narrower at the start, where a wide window would flatten the steepest part
        parts.append(values[place - near : place + near + 1])
    return [sum(part) / len(part) for part in parts]


def series(rows: Rows, metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it was logged and is a number."""
    found = [(row["step"], row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    return [step for step, _ in found], [value for _, value in found]


def _draw(panels: Sequence[Panel], rows: Mapping[str, Rows], pools: Rows) -> bytes:
    # The classes instead of pyplot: no global state, and the flow may draw from any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(panels) + bool(pools)
    columns = next((n for n in (3, 4) if count % n == 0), min(3, count))
    lines = -(-count // columns)
    figure = Figure(figsize=(12.4, 2.75 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(lines, columns, number + 1), panel, rows[panel.stage])
    if pools:
        draw_over_kl(figure.add_subplot(lines, columns, count), pools)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _draw_panel(axes: Any, panel: Panel, rows: Rows) -> None:
    steps, values = series(rows, panel.metric)
    line = smoothed(values)
    if panel.zero:
        axes.axhline(0, color="#9aa3b0", linewidth=0.8, linestyle=(0, (4, 3)))
    if panel.band:
        spread = smoothed(series(rows, panel.band)[1])
        if len(spread) == len(line):
            low, high = zip(*((m - s, m + s) for m, s in zip(line, spread, strict=True)), strict=True)
            axes.fill_between(steps, low, high, color=RAW, alpha=0.35, linewidth=0, label="± 1 std")
    axes.plot(steps, values, color=RAW, linewidth=1.0)
    axes.plot(steps, line, color=LINE, linewidth=1.8, marker="o" if len(steps) < 3 else None, markersize=4)
    held_out, measured = series(rows, HELD_OUT.get(panel.metric, ""))
    if measured:
        axes.plot(held_out, measured, "D", color=GUIDE, markersize=6, label=f"held out: {measured[-1]:.3g}", zorder=5)
    if panel.band or measured:
        axes.legend(fontsize=8, frameon=False)
    plain(axes, panel.title, "rollout" if panel.stage == "ppo" else "optimizer step", panel.unit)


def draw_over_kl(axes: Any, pools: Rows, title: str = "PPO: both rewards over KL") -> None:
    """Both reward models over the KL that PPO went through (as in Gao, Schulman & Hilton 2023)."""
    ordered = sorted(pools, key=lambda pool: pool["kl"])
    kl = [pool["kl"] for pool in ordered]
    for scorer, label, colour in (("reward", "reward model", LINE), ("gold", "gold reward model", GUIDE)):
        scores = [pool[scorer] for pool in ordered]
        axes.plot(kl, scores, "o", color=colour, markersize=3, alpha=0.5)
        axes.plot(smoothed(kl), smoothed(scores), color=colour, linewidth=1.8, label=label)
    axes.legend(fontsize=8, frameon=False)
    plain(axes, title, "KL to the SFT model, nats per answer", "score")


def plain(axes: Any, title: str, below: str, left: str) -> None:
    """The look of every panel: a title, two labels, a light grid, two spines."""
    axes.set_title(title, fontsize=10.5, fontweight="bold", color=INK, loc="left")
    axes.set_xlabel(below, fontsize=8.5, color=INK)
    axes.set_ylabel(left, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color="#e8ebf0", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c5ccd6")
