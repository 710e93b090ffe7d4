"""The one figure that says most about each step, for tables, plans and progress."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tasks.report import StepRow
from tasks.stages import StageRef


def rows(refs: Iterable[StageRef]) -> list[StepRow]:
    """A line per stage for the table of a run; the stages of one name, such as clean, share a line."""
    together: dict[str, list[StageRef]] = {}
    for ref in refs:
        together.setdefault(ref.stage, []).append(ref)
    return [_row(name, group) for name, group in together.items()]


def _row(name: str, group: list[StageRef]) -> StepRow:
    made = [ref for ref in group if not ref.cached]
    return StepRow(
        step=name if len(group) == 1 else f"{name} × {len(group)}",
        seconds=sum(ref.seconds for ref in made or group),
        cached=not made,
        gpu_hours=sum(gpu_hours(ref) for ref in made or group),
        metric=headline_of_many(name, [ref.metrics for ref in group]),
    )


def gpu_hours(ref: StageRef) -> float:
    """What the stage cost when it was made: its time on each GPU that it held."""
    return ref.seconds / 3600 * float(ref.metrics.get("gpus", 0))


def headline_of_many(stage: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The main figure of the stages of one name taken together."""
    if len(metrics) == 1:
        return headline(stage, metrics[0])
    if stage == "download":
        return f"{sum(sum(m['rows'].values()) for m in metrics):,} rows of {len(metrics)} sets"
    if stage == "clean":
        kept, rows_in = (sum(m["total"][name] for m in metrics) for name in ("kept", "rows_in"))
        return f"{kept:,} of {rows_in:,} pairs kept"
    return ""


def headline(stage: str, metrics: Mapping[str, Any]) -> str:
    """The main figure of a finished stage, with its name."""
    find = HEADLINES.get(stage)
    return find(metrics) if find else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _by_gold(metrics: Mapping[str, Any]) -> str:
    return f", gold {_percent(metrics['gold_win_rate'])}" if "gold_win_rate" in metrics else ""


PHASES = ("sft", "reward", "ppo", "judge")
HEADLINES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "demo": lambda m: f"{m['pairs']:,} pairs",
    "download": lambda m: f"{sum(m['rows'].values()):,} rows",
    "clean": lambda m: f"{m['total']['kept']:,} of {m['total']['rows_in']:,} pairs kept",
    "blend": lambda m: f"{m['train']:,} train and {m['test']:,} test pairs",
    "split": lambda m: ", ".join(f"{p} {m[p]['train']['rows']:,}" for p in PHASES if p in m) + " train pairs",
    "base": lambda m: f"{m['parameters']:,} parameters" if "parameters" in m else f"vocabulary {m['vocabulary']:,}",
    "tokenise": lambda m: (
        f"{sum(t['sum'] for sides in m.values() for side in sides.values() for t in side['tokens'].values()):,} tokens"
    ),
    "ptx": lambda m: f"{m['train']['chunks']:,} chunks of unsupervised text",
    "sft": lambda m: f"perplexity {m['perplexity']:.2f}",
    "reward": lambda m: f"accuracy {_percent(m['accuracy'])}",
    "gold": lambda m: f"accuracy {_percent(m['accuracy'])}",
    "ppo": lambda m: f"reward {m['first_reward']:+.2f} → {m['reward']:+.2f}, KL {m['kl']:.2f}",
    "evaluate": lambda m: f"PPO wins {_percent(m['win_rate'])} against SFT{_by_gold(m)}",
    "compare": lambda m: f"the candidate wins {_percent(m['win_rate'])} against the champion{_by_gold(m)}",
    "verdicts": lambda m: (
        f"PPO wins {_percent(m['win_rate'])} of {m['prompts']} by the API's judge"
        if "win_rate" in m
        else "the API's judge gave no verdict"
    ),
}
"""Stage -> its main figure out of its metrics."""
