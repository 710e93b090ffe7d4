"""Draws ../pictures/smollm2-135m.png from smollm2-135m-pools.jsonl: python docs/results/over_kl.py

A row is a pool of PPO: the mean KL of its answers and their mean score by the reward model and by the gold one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.figures import GUIDE, INK, LINE, plain, smoothed
from tasks.json_lines import read_rows

HERE = Path(__file__).parent
RUNS = {"config": "o", "kl_coef 0.01, learning rate 1e-4": "."}
"""Run -> how its pools are marked."""
GATE = 12
"""Nats beyond which the config's gates keep a model out."""


def main() -> None:
    rows = read_rows(HERE / "smollm2-135m-pools.jsonl")
    figure = Figure(figsize=(8.2, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run, marker in RUNS.items():
        pools = sorted((row for row in rows if row["run"] == run), key=lambda row: row["kl"])
        kl = [pool["kl"] for pool in pools]
        for scorer, name, colour in (("reward", "reward model", LINE), ("gold", "gold reward model", GUIDE)):
            scores = [pool[scorer] for pool in pools]
            axes.plot(kl, scores, marker, color=colour, markersize=4, alpha=0.45)
            if run != "config":
                axes.plot(smoothed(kl), smoothed(scores), color=colour, linewidth=1.8, label=name)
    axes.axvline(GATE, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate("gate: KL <= 12", (GATE + 0.4, 1.25), fontsize=8.5, color=INK)
    axes.annotate("circles: the shipped config", (0.1, 0.47), fontsize=8.5, color=INK)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    plain(axes, "Over-optimisation, once the brakes are off", "KL to the SFT model, nats per answer", "score")
    figure.savefig(HERE.parent / "pictures" / "smollm2-135m.png", facecolor="white")


if __name__ == "__main__":
    main()
