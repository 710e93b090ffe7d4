"""What was found of the answers, as the tables of the run's report and of Prefect: win rates, means, samples."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks import page
from tasks.data_report import metrics_of
from tasks.gates import answers
from tasks.stages import StageRef

LONGEST_TEXT = 1500
MEASURES = (
    ("reward", "Reward, mean ± std", 3),
    ("gold", "Gold reward, mean ± std", 3),
    ("true_score", "True score of the demo task, mean ± std", 3),
    ("kl", "KL to the SFT model, nats per answer", 2),
    ("tokens", "Answer length, tokens", 1),
    ("eos_rate", "Answers that end by themselves", None),
    ("repetition", "Repeated runs of four words in an answer", None),
    ("distinct_1", "Distinct words of all answers", None),
    ("distinct_2", "Distinct word pairs", None),
    ("distinct_3", "Distinct runs of three words", None),
    ("perplexity", "Perplexity on the unsupervised text", 2),
)
"""Name in the metrics of `evaluate` -> what it is called, digits (None: percent)."""
CONTESTS = (
    ("evaluate", "", "PPO against SFT"),
    ("evaluate", "ema_", "Moving average against PPO"),
    ("compare", "", "Candidate against the champion"),
)
"""Stage, how its figures begin, what it is called."""
ASKED = {"evaluate": "verdicts", "compare": "verdicts-compare"}
"""Stage -> the one in which a judge behind an API said what it thinks of its answers."""
LABELS = {"sft": "SFT", "ppo": "PPO", "ema": "Moving average", "champion": "Champion"}
OF_SOURCES = ("kl", "tokens", "eos_rate", "repetition", "distinct_2")
"""What is shown of a model's answers to the prompts of each source."""


def win_rates(refs: Mapping[str, StageRef]) -> list[dict[str, str]]:
    """A line per contest of the run: by the reward model, by the gold one, their gap, and both at equal length."""
    found = []
    for stage, begins, label in CONTESTS:
        metrics = metrics_of(refs, stage)
        if f"{begins}win_rate" in metrics:
            line = {"contest": label} | _line(metrics, begins) | {"prompts": f"{metrics['prompts']:,}"}
            found.append(line | _by_api(metrics_of(refs, ASKED[stage]), begins))
    return _table(found)


def _table(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """The lines with the same columns: those that some line fills."""
    columns = dict.fromkeys(column for line in lines for column, text in line.items() if text)
    return [{column: line.get(column, "") for column in columns} for line in lines]


def _by_api(metrics: Mapping[str, Any], begins: str) -> dict[str, str]:
    name = f"{begins}win_rate"
    if name not in metrics:
        return {}
    ended = ", ended at its cap" if metrics.get(f"{begins}capped") else ""
    return {"by the API's judge": f"{_with_interval(metrics, name)} of {metrics[f'{begins}prompts']}{ended}"}


def per_source(refs: Mapping[str, StageRef]) -> list[dict[str, str]]:
    """The same per contest and source."""
    found = []
    for stage, begins, line, metrics in _by_source(refs):
        asked = metrics_of(refs, ASKED[stage]).get(f"{begins}per_source", {})
        line |= _line(metrics, "") | {"prompts": f"{metrics['prompts']:,}"}
        found.append(line | _by_api(asked.get(line["source"], {}), ""))
    return _table(found)


def answers_per_source(refs: Mapping[str, StageRef]) -> list[dict[str, str]]:
    """What the answers of PPO and of the moving average are like, source by source."""
    titles = {measure: (title, digits) for measure, title, digits in MEASURES if measure in OF_SOURCES}
    found = []
    for stage, begins, line, metrics in _by_source(refs):
        if stage == "evaluate":  # the candidate in `compare` is PPO
            first = begins.removesuffix("_") or "ppo"
            means = {title: _mean(metrics, first, measure, digits) for measure, (title, digits) in titles.items()}
            found.append({"answers of": LABELS[first], "source": line["source"]} | means)
    return _table(found)


def _by_source(refs: Mapping[str, StageRef]) -> Iterator[tuple[str, str, dict[str, str], Mapping[str, Any]]]:
    """Stage, how its figures begin, the first columns of a line, and the metrics of each contest and source."""
    for stage, begins, label in CONTESTS:
        for source, metrics in metrics_of(refs, stage).get(f"{begins}per_source", {}).items():
            yield stage, begins, {"contest": label, "source": source}, metrics


def _line(metrics: Mapping[str, Any], begins: str) -> dict[str, str]:
    names = {
        "by the reward model": f"{begins}win_rate",
        "by the gold reward model": f"{begins}gold_win_rate",
        "gap": f"{begins}win_rate_gap",
        "at equal length": f"{begins}length_controlled_win_rate",
        "gold, at equal length": f"{begins}gold_length_controlled_win_rate",
    }
    return {title: _with_interval(metrics, name) for title, name in names.items() if name in metrics}


def _with_interval(metrics: Mapping[str, Any], name: str) -> str:
    """A share with its 95 % interval; a gap in points."""
    value, low, high = (100 * metrics[key] for key in (name, f"{name}_low", f"{name}_high"))
    if name.endswith("gap"):
        return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def hacking(evaluated: Mapping[str, Any]) -> str:
    """What the two reward models say together, as a sentence; empty where there was but one."""
    if "gain_gap" not in evaluated:
        return ""
    gains = f"{evaluated['gain']:+.2f} and {evaluated['gold_gain']:+.2f} standard deviations of SFT's answers"
    said = f"PPO gained {gains} by the reward model and by the gold one, which it never saw."
    if evaluated["win_rate_gap_low"] > 0:
        said += " The first is surely more often on PPO's side: a part of what it gained is the reward model's errors."
    return said


def gain_in_std(evaluated: Mapping[str, Any], measure: str) -> float | None:
    """By how many standard deviations of SFT's answers PPO's mean is higher; None where that was not measured."""
    spread = evaluated.get(f"sft_{measure}_std")
    if not spread or f"ppo_{measure}" not in evaluated:
        return None
    return float((evaluated[f"ppo_{measure}"] - evaluated[f"sft_{measure}"]) / spread)


def comparison(refs: Mapping[str, StageRef]) -> list[dict[str, str]]:
    """What was measured of the answers: a line per measure; its name, a column per model, by how much PPO has more."""
    champion = {name: value for name, value in metrics_of(refs, "compare").items() if name.startswith("champion_")}
    found = {**metrics_of(refs, "evaluate"), **champion}
    lines = []
    for measure, label, digits in MEASURES:
        sft, ppo = found.get(f"sft_{measure}"), found.get(f"ppo_{measure}")
        if sft is None or ppo is None:
            continue
        line = {"": label} | {title: _mean(found, name, measure, digits) for name, title in LABELS.items()}
        more = f"{(ppo - sft) * 100:+.1f} points" if digits is None else f"{ppo - sft:+.{digits}f}"
        lines.append(line | {"PPO less SFT": more})
    return _table(lines)


def _mean(found: Mapping[str, Any], name: str, measure: str, digits: int | None) -> str:
    value, spread = found.get(f"{name}_{measure}"), found.get(f"{name}_{measure}_std")
    if value is None:
        return ""
    if digits is None:
        return page.percent(value)
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def samples(directory: Path, count: int, first: str = "ppo", second: str = "sft") -> list[dict[str, Any]]:
    """Answers to show: spread evenly from the first's worst loss to its best win, so that none is picked.

    Args:
        directory: of `evaluate` or `compare`.
    """
    try:
        rows = answers(directory)
    except OSError:
        return []
    rows = sorted(rows, key=lambda row: row[f"{first}_reward"] - row[f"{second}_reward"])
    if len(rows) > count > 0:
        rows = [rows[round(place * (len(rows) - 1) / max(1, count - 1))] for place in range(count)]
    return [
        {
            "prompt": _cut(row["prompt"]),
            "source": row.get("source", ""),
            "answers": [_answer(row, name) for name in (second, first)],
            "winner": "tie"
            if row[f"{first}_reward"] == row[f"{second}_reward"]
            else max((second, first), key=lambda n: row[f"{n}_reward"]),
        }
        for row in rows[:count]
    ]


def _answer(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": LABELS[name],
        "text": _cut(row[name]),
        "reward": f"{row[f'{name}_reward']:+.2f}",
        "gold": f"{row[f'{name}_gold']:+.2f}" if f"{name}_gold" in row else None,
        "tokens": row.get(f"{name}_tokens"),
        "true_score": f"{row[f'{name}_true_score']:.2f}" if f"{name}_true_score" in row else None,
        "ended": row.get(f"{name}_ended", True),
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
