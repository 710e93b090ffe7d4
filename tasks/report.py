"""The report of a run as one HTML file: its steps, figures, curves, answers, data and lineage.

Everything in it comes from the run's stage directories: their manifests, answers and curves.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import data_report, figures, page
from tasks.data_report import metrics_of
from tasks.gates import GateResult
from tasks.stages import StageRef, read_manifest

SAMPLES = 8
LONGEST_TEXT = 1500
MEASURES = (
    ("reward", "Reward, mean ± std", 3),
    ("true_score", "True score of the demo task, mean ± std", 3),
    ("kl", "KL to the SFT model, nats per answer", 2),
    ("tokens", "Answer length, tokens", 1),
    ("eos_rate", "Answers that end by themselves", None),
)
"""Name in the metrics of `evaluate` -> what it is called, digits (None: percent)."""


@dataclass(frozen=True)
class StepRow:
    """A line of the table of steps."""

    step: str
    seconds: float
    cached: bool
    metric: str
    """The step's main metric with its name, such as "accuracy 0.87"."""


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run when it ends."""

    name: str
    flow_run: str
    verdict: str
    """A sentence: which version was promoted or not, and why."""
    promoted: bool
    rows: Sequence[StepRow]
    refs: Mapping[str, StageRef]
    """The run's finished stages by key, as in the graph: sft, clean:SOURCE, ..."""
    config: str
    """The resolved config as YAML."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Registered model -> version and aliases, such as "3 (candidate, champion)"."""
    run_id: str | None = None
    run_url: str | None = None
    gates: Sequence[GateResult] = ()
    """What the candidate had to pass."""
    samples: int = SAMPLES
    """Answers that are shown side by side."""


def write(path: Path, run: RunSummary) -> Path:
    """Write the report. Returns its path."""
    html = render(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(html, encoding="utf-8")
    draft.replace(path)
    return path


def render(run: RunSummary) -> str:
    """The report as HTML."""
    refs = run.refs
    image = figures.curves({key: refs[key].directory for key in ("sft", "reward", "ppo") if key in refs})
    return page.render(
        "run.html",
        run=run,
        total=page.duration(sum(row.seconds for row in run.rows if not row.cached)),
        tiles=tiles(refs),
        data=data_report.data_table(refs),
        phases=data_report.phase_table(refs),
        comparison=comparison(metrics_of(refs, "evaluate")),
        evaluate=metrics_of(refs, "evaluate"),
        reward=metrics_of(refs, "reward"),
        curves=image,
        samples=samples(refs["evaluate"].directory / "answers.jsonl", run.samples) if "evaluate" in refs else [],
        lineage=lineage(refs),
        code=code(refs),
    )


def tiles(refs: Mapping[str, StageRef]) -> list[tuple[str, str, str]]:
    """The figures that a reader wants first: label, value, what to hold it against."""
    evaluated, reward = metrics_of(refs, "evaluate"), metrics_of(refs, "reward")
    found = []
    if "win_rate" in evaluated:
        interval = evaluated.get("win_rate_interval")
        note = f"± {interval * 100:.1f}, {evaluated['prompts']} held-out prompts" if interval is not None else ""
        found.append(("PPO wins against SFT", page.percent(evaluated["win_rate"]), note))
    for measure, label in (("reward", "Reward gained by PPO"), ("true_score", "True score gained by PPO")):
        gain = gain_in_std(evaluated, measure)
        if gain is not None:
            before, after = evaluated[f"sft_{measure}"], evaluated[f"ppo_{measure}"]
            found.append((label, f"{gain:+.2f} std", f"{before:.2f} → {after:.2f}, std of SFT's answers"))
    if "ppo_kl" in evaluated:
        found.append(("KL to the SFT model", f"{evaluated['ppo_kl']:.2f}", "nats per answer"))
    if "ema_win_rate" in evaluated:
        note = f"± {evaluated['ema_win_rate_interval'] * 100:.1f}, moving average of the weights"
        found.append(("EMA wins against PPO", page.percent(evaluated["ema_win_rate"]), note))
    if "accuracy" in reward:
        alone = reward.get("length_accuracy")
        found.append(
            (
                "Reward model's accuracy",
                page.percent(reward["accuracy"]),
                f"length alone: {page.percent(alone)}" if alone is not None else "",
            )
        )
    return found


def gain_in_std(evaluated: Mapping[str, Any], measure: str) -> float | None:
    """By how many standard deviations of SFT's answers PPO's mean is higher; None where that was not measured."""
    spread = evaluated.get(f"sft_{measure}_std")
    if not spread or f"ppo_{measure}" not in evaluated:
        return None
    return float((evaluated[f"ppo_{measure}"] - evaluated[f"sft_{measure}"]) / spread)


def comparison(evaluated: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What was measured of both models' answers: name, SFT, PPO, difference."""
    lines = []
    for measure, label, digits in MEASURES:
        sft, ppo = evaluated.get(f"sft_{measure}"), evaluated.get(f"ppo_{measure}")
        if sft is None or ppo is None:
            continue
        if digits is None:
            lines.append((label, page.percent(sft), page.percent(ppo), f"{(ppo - sft) * 100:+.1f} points"))
            continue
        texts = [
            f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
            for value, spread in (
                (sft, evaluated.get(f"sft_{measure}_std")),
                (ppo, evaluated.get(f"ppo_{measure}_std")),
            )
        ]
        lines.append((label, texts[0], texts[1], f"{ppo - sft:+.{digits}f}"))
    return lines


def samples(path: Path, count: int) -> list[dict[str, Any]]:
    """Answers to show: spread evenly from PPO's worst loss against SFT to its best win, so that none is picked."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    rows = sorted(rows, key=lambda row: row["ppo_reward"] - row["sft_reward"])
    if len(rows) > count > 0:
        rows = [rows[round(place * (len(rows) - 1) / max(1, count - 1))] for place in range(count)]
    return [
        {
            "prompt": _cut(row["prompt"]),
            "source": row.get("source", ""),
            "answers": [_answer(row, name, label) for name, label in (("sft", "SFT"), ("ppo", "PPO"))],
            "winner": "tie"
            if row["ppo_reward"] == row["sft_reward"]
            else max(("sft", "ppo"), key=lambda n: row[f"{n}_reward"]),
        }
        for row in rows[:count]
    ]


def lineage(refs: Mapping[str, StageRef]) -> list[dict[str, Any]]:
    """Every stage with its identity and what it read."""
    keys = {ref.digest: key for key, ref in refs.items()}
    lines = []
    for key, ref in refs.items():
        manifest = read_manifest(ref.directory) or {}
        inputs = manifest.get("inputs", {}).values()
        lines.append(
            {
                "key": key,
                "fingerprint": ref.fingerprint,
                "digest": ref.digest[:16],
                "inputs": ", ".join(dict.fromkeys(keys.get(entry["digest"], entry["stage"]) for entry in inputs)),
                "made": manifest.get("started", "").replace("T", " ").replace("+00:00", ""),
                "path": ref.path,
            }
        )
    return lines


def code(refs: Mapping[str, StageRef]) -> dict[str, Any]:
    """Commits and package versions that the stages ran with; several where cached stages are older."""
    commits: Counter[str] = Counter()
    versions: dict[str, set[str]] = {}
    for ref in refs.values():
        manifest = read_manifest(ref.directory) or {}
        made_by = manifest.get("code", {})
        commits[
            f"{made_by['commit'][:12]}{' and changes' if made_by.get('dirty') else ''}"
            if "commit" in made_by
            else "no commit"
        ] += 1
        for name, version in manifest.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    return {
        "commits": [
            f"{commit} ({count} stages)" if len(commits) > 1 else commit for commit, count in commits.most_common()
        ],
        "versions": {name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
    }


def _answer(row: Mapping[str, Any], name: str, label: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "text": _cut(row[name]),
        "reward": f"{row[f'{name}_reward']:+.2f}",
        "tokens": row.get(f"{name}_tokens"),
        "true_score": f"{row[f'{name}_true_score']:.2f}" if f"{name}_true_score" in row else None,
        "ended": row.get(f"{name}_ended", True),
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
