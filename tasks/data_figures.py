"""The prepared data drawn: who gives how much, what was dropped, how long it is, and how much length tells."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.figures import GUIDE, INK, LINE, plain

if TYPE_CHECKING:
    import pandas as pd

PHASE_COLOURS = {"sft": "#1f4e8c", "reward": "#c2571a", "ppo": "#3a8f6b", "judge": "#8a5fa8"}
WHOLE = {"sft": "sequence", "reward": "chosen", "ppo": "prompt", "judge": "chosen"}
"""Phase -> the part of its rows whose lengths are drawn: `stats.token_lengths`."""
WHOLE_NAMES = {"sequence": "prompt and answer", "chosen": "preferred answer", "prompt": "prompt"}


def draw(rows: "pd.DataFrame", drops: Mapping[str, int], lengths: "pd.DataFrame", preferences: "pd.DataFrame") -> bytes:
    """Four panels as a PNG.

    Args:
        rows: `stats.phase_table`; its train columns are drawn.
        drops: reason -> rows.
        lengths: `stats.token_lengths`.
        preferences: `stats.preference_table`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tall = 1.2 + 0.34 * max(len(rows), len(drops), 6)
    figure = Figure(figsize=(12.4, 2 * tall), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _shares(axes[0][0], rows.drop(index="total"))
    _drops(axes[0][1], drops)
    _lengths(axes[1][0], lengths)
    _bias(axes[1][1], preferences)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _shares(axes: Any, rows: "pd.DataFrame") -> None:
    left = [0] * len(rows)
    names = [str(name).rpartition("/")[2] for name in rows.index]
    for column in (name for name in rows.columns if name.endswith("-train")):
        phase = column.removesuffix("-train")
        axes.barh(names, rows[column], left=left, color=PHASE_COLOURS[phase], label=phase, height=0.7)
        left = [before + count for before, count in zip(left, rows[column], strict=True)]
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    plain(axes, "Train rows by source and phase", "rows", "")


def _drops(axes: Any, drops: Mapping[str, int]) -> None:
    ordered = sorted(drops.items(), key=lambda item: -item[1])
    bars = axes.barh([reason.replace("_", " ") for reason, _ in ordered], [count for _, count in ordered], color=LINE)
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=3, color=INK)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    plain(axes, "Rows dropped, by reason", "rows", "")


def _lengths(axes: Any, lengths: "pd.DataFrame") -> None:
    longest = int(lengths["tokens"][lengths["part"].isin(WHOLE_NAMES)].max())
    edges = [longest * place / 40 for place in range(41)]
    for phase in lengths["phase"].unique():
        part = WHOLE[phase]
        tokens = lengths["tokens"][(lengths["phase"] == phase) & (lengths["part"] == part)]
        share = [1 / len(tokens)] * len(tokens)
        label = f"{phase}: {WHOLE_NAMES[part]}"
        axes.hist(tokens, edges, weights=share, histtype="step", color=PHASE_COLOURS[phase], label=label, linewidth=1.6)
    axes.legend(fontsize=8, frameon=False)
    plain(axes, "Lengths of train rows", "tokens", "share of rows")


def _bias(axes: Any, preferences: "pd.DataFrame") -> None:
    shares = preferences["longer_chosen"].dropna()
    names = [f"{str(name).rpartition('/')[2]} ({preferences.loc[name, 'pairs']:,})" for name in shares.index]
    bars = axes.barh(names, shares, color=LINE, height=0.7)
    axes.bar_label(bars, fmt="{:.0%}", fontsize=8, padding=3, color=INK)
    axes.axvline(0.5, color=GUIDE, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.08)
    axes.invert_yaxis()
    plain(axes, "Pairs whose longer answer is preferred", "share of pairs of different length", "")
