"""Draws ../pictures/smollm2-135m.png from smollm2-135m-pools.jsonl: python docs/results/over_kl.py

The rows are the `pools.jsonl` that `evaluate` left of a run with `ppo.kl_coef=0.01` and a policy at 1e-4: of every
third pool of PPO the mean KL of its answers and their mean score by the reward model and by the gold one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.figures import INK, draw_over_kl
from tasks.json_lines import read_rows

HERE = Path(__file__).parent
GATE = 12
"""Nats beyond which the config's gates keep a model out."""


def main() -> None:
    figure = Figure(figsize=(8.2, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    title = "PPO with a fifth of the KL penalty and 2.5 times the learning rate"
    draw_over_kl(axes, read_rows(HERE / "smollm2-135m-pools.jsonl"), title)
    axes.axvline(GATE, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(GATE + 0.4, 0.05, "gate: KL <= 12", transform=axes.get_xaxis_transform(), fontsize=8.5, color=INK)
    figure.savefig(HERE.parent / "pictures" / "smollm2-135m.png", facecolor="white")


if __name__ == "__main__":
    main()
