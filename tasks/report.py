"""The report of a run as one HTML file: its steps, figures, curves, answers, data and lineage.

Everything in it comes from the run's stage directories: their manifests, answers and curves.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks import data_report, evaluation_report, figures, page
from tasks.data_report import metrics_of
from tasks.evaluation_report import gain_in_std
from tasks.gates import GateResult
from tasks.stages import StageRef, read_manifest, write_text

SAMPLES = 8
DRAWN = ("sft", "reward", "ppo", "evaluate")
REWARD_MODELS = {"Reward model": "reward", "Gold reward model": "gold"}
"""What it is called -> its stage."""


@dataclass(frozen=True)
class StepRow:
    """A line of the table of steps."""

    step: str
    seconds: float
    cached: bool
    metric: str
    """The step's main metric with its name, such as "accuracy 0.87"."""
    gpu_hours: float = 0.0
    """Of a cached step: those that it took when it was made."""


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
    memory: Mapping[str, str] = field(default_factory=dict)
    """Stage -> its peak on the GPU as measured and as predicted."""

    @cached_property
    def curves(self) -> bytes | None:
        """The curves of its training stages as a PNG, which takes a second to draw; None where there are none."""
        return figures.curves({key: self.refs[key].directory for key in DRAWN if key in self.refs})


def write(path: Path, run: RunSummary) -> Path:
    """Write the report. Returns its path."""
    html = render(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


def render(run: RunSummary) -> str:
    """The report as HTML."""
    refs = run.refs
    return page.render(
        "run.html",
        run=run,
        total=page.duration(sum(row.seconds for row in run.rows if not row.cached)),
        gpu_hours=sum(row.gpu_hours for row in run.rows if not row.cached),
        gpu_hours_ever=sum(row.gpu_hours for row in run.rows),
        tiles=tiles(refs),
        data=data_report.data_table(refs),
        phases=data_report.phase_table(refs),
        win_rates=evaluation_report.win_rates(refs),
        per_source=[evaluation_report.per_source(refs), evaluation_report.answers_per_source(refs)],
        hacking=evaluation_report.hacking(metrics_of(refs, "evaluate")),
        comparison=evaluation_report.comparison(refs),
        evaluate=metrics_of(refs, "evaluate"),
        reward_models=[(name, metrics) for name in REWARD_MODELS if (metrics := metrics_of(refs, REWARD_MODELS[name]))],
        curves=run.curves,
        samples=_samples(refs, run.samples),
        lineage=lineage(refs),
        code=code(refs),
    )


def _samples(refs: Mapping[str, StageRef], count: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """Answers of the two models of each contest, with what they are."""
    found = []
    for stage, rival, label in (("evaluate", "sft", "SFT"), ("compare", "champion", "the champion")):
        if stage in refs and (rows := evaluation_report.samples(refs[stage].directory, count, "ppo", rival)):
            found.append((label, rows))
    return found


def tiles(refs: Mapping[str, StageRef]) -> list[tuple[str, str, str]]:
    """The figures that a reader wants first: label, value, what to hold it against."""
    evaluated, reward = metrics_of(refs, "evaluate"), metrics_of(refs, "reward")
    found = []
    if "win_rate" in evaluated:
        note = f"{_interval(evaluated, 'win_rate')}, {evaluated['prompts']} held-out prompts"
        found.append(("PPO wins against SFT", page.percent(evaluated["win_rate"]), note))
    if "gold_win_rate" in evaluated:
        note = f"{_interval(evaluated, 'gold_win_rate')}, by a model that PPO never saw"
        found.append(("The same by the gold reward model", page.percent(evaluated["gold_win_rate"]), note))
    for measure, label in (("reward", "Reward gained by PPO"), ("true_score", "True score gained by PPO")):
        gain = gain_in_std(evaluated, measure)
        if gain is not None:
            before, after = evaluated[f"sft_{measure}"], evaluated[f"ppo_{measure}"]
            found.append((label, f"{gain:+.2f} std", f"{before:.2f} → {after:.2f}, std of SFT's answers"))
    if "ppo_kl" in evaluated:
        found.append(("KL to the SFT model", f"{evaluated['ppo_kl']:.2f}", "nats per answer"))
    if "ema_win_rate" in evaluated:
        note = f"{_interval(evaluated, 'ema_win_rate')}, moving average of the weights"
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


def _interval(metrics: Mapping[str, Any], name: str) -> str:
    return f"{100 * metrics[f'{name}_low']:.1f} to {100 * metrics[f'{name}_high']:.1f}"


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
