"""The report of a run: one HTML file that needs nothing else, to be opened, mailed or kept.

Everything in it comes from the run's stage directories: their manifests, answers and curves. It is written with
autoescaping on, since prompts and answers are other people's text.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tasks import figures
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
    samples: int = SAMPLES
    """Answers that are shown side by side."""


def write(path: Path, run: RunSummary) -> Path:
    """Write the report. Returns its path."""
    page = render(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
    return path


def render(run: RunSummary) -> str:
    """The report as HTML."""
    refs = run.refs
    image = figures.curves({key: refs[key].directory for key in ("sft", "reward", "ppo") if key in refs})
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["duration"] = duration
    return environment.from_string(PAGE).render(
        run=run,
        style=Markup(STYLE),
        written=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        total=duration(sum(row.seconds for row in run.rows if not row.cached)),
        tiles=tiles(refs),
        data=data_table(refs),
        phases=phase_table(refs),
        comparison=comparison(_metrics(refs, "evaluate")),
        evaluate=_metrics(refs, "evaluate"),
        reward=_metrics(refs, "reward"),
        curves=base64.b64encode(image).decode() if image else None,
        samples=samples(refs["evaluate"].directory / "answers.jsonl", run.samples) if "evaluate" in refs else [],
        lineage=lineage(refs),
        code=code(refs),
    )


def duration(seconds: float) -> str:
    """A time as people say it: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def tiles(refs: Mapping[str, StageRef]) -> list[tuple[str, str, str]]:
    """The figures that a reader wants first: label, value, what to hold it against."""
    evaluated, reward = _metrics(refs, "evaluate"), _metrics(refs, "reward")
    found = []
    if "win_rate" in evaluated:
        interval = evaluated.get("win_rate_interval")
        note = f"± {interval * 100:.1f}, {evaluated['prompts']} held-out prompts" if interval is not None else ""
        found.append(("PPO wins against SFT", percent(evaluated["win_rate"]), note))
    for measure, label in (("reward", "Reward gained by PPO"), ("true_score", "True score gained by PPO")):
        gain = gain_in_std(evaluated, measure)
        if gain is not None:
            before, after = evaluated[f"sft_{measure}"], evaluated[f"ppo_{measure}"]
            found.append((label, f"{gain:+.2f} std", f"{before:.2f} → {after:.2f}, std of SFT's answers"))
    if "ppo_kl" in evaluated:
        found.append(("KL to the SFT model", f"{evaluated['ppo_kl']:.2f}", "nats per answer"))
    if "ema_win_rate" in evaluated:
        note = f"± {evaluated['ema_win_rate_interval'] * 100:.1f}, moving average of the weights"
        found.append(("EMA wins against PPO", percent(evaluated["ema_win_rate"]), note))
    if "accuracy" in reward:
        alone = reward.get("length_accuracy")
        found.append(
            (
                "Reward model's accuracy",
                percent(reward["accuracy"]),
                f"length alone: {percent(alone)}" if alone is not None else "",
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
            lines.append((label, percent(sft), percent(ppo), f"{(ppo - sft) * 100:+.1f} points"))
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


def data_table(refs: Mapping[str, StageRef]) -> list[dict[str, Any]]:
    """Rows read, rows left and drops by reason, through cleaning and blending: a line per source and one for all."""
    blended: Mapping[str, Any] = next(
        (ref.metrics.get("sources", {}) for ref in refs.values() if ref.stage == "blend"), {}
    )
    lines = []
    for key, ref in refs.items():
        if ref.stage == "clean":
            name = key.partition(":")[2] or key
            cleaned = ref.metrics.get("total", {})
            sides = list(blended.get(name, {}).values())
            kept = sum(side["kept"] for side in sides) if sides else cleaned.get("kept", 0)
            drops = Counter(cleaned.get("drops", {}))
            for side in sides:
                drops.update(side["drops"])
            lines.append(_data_line(name, cleaned.get("rows_in", 0), kept, drops))
    if len(lines) > 1:
        every: Counter[str] = Counter()
        for line in lines:
            every.update(line["counts"])
        rows_in, kept = (sum(line[column] for line in lines) for column in ("rows_in", "kept"))
        lines.append(_data_line("all sources", rows_in, kept, every) | {"is_total": True})
    return lines


def phase_table(refs: Mapping[str, StageRef]) -> list[tuple[str, str, str]]:
    """Tokenised rows per phase: name, train, held out."""
    phases = _metrics(refs, "tokenise")
    names = (("sft", "SFT"), ("reward", "Reward model"), ("ppo", "PPO (prompts)"))
    return [
        (title, *(f"{phases[name].get(side, {}).get('kept', 0):,}" for side in ("train", "eval")))  # type: ignore[misc]
        for name, title in names
        if name in phases
    ]


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


def percent(share: float) -> str:
    """A share in percent, with one digit."""
    return f"{share * 100:.1f} %"


def _metrics(refs: Mapping[str, StageRef], key: str) -> Mapping[str, Any]:
    return refs[key].metrics if key in refs else {}


def _data_line(name: str, rows_in: int, kept: int, drops: Mapping[str, int]) -> dict[str, Any]:
    counts = Counter({reason: count for reason, count in drops.items() if count})
    return {"name": name, "rows_in": rows_in, "kept": kept, "counts": counts, "is_total": False}


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


STYLE = """
:root { --ink: #1d2430; --soft: #5d6878; --line: #dfe4eb; --paper: #ffffff; --ground: #f5f7fa; --blue: #1f4e8c;
        --good: #1a7f4b; --good-ground: #e6f4ec; --calm: #7a5a00; --calm-ground: #fbf3dc; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 14px; }
h3 { font-size: 15px; margin: 22px 0 8px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
          margin-top: 20px; }
.soft { color: var(--soft); }
.verdict { display: flex; gap: 12px; align-items: baseline; border-radius: 10px; padding: 14px 18px; margin-top: 18px;
           background: var(--calm-ground); font-size: 16px; }
.verdict b { color: var(--calm); white-space: nowrap; }
.verdict.promoted { background: var(--good-ground); }
.verdict.promoted b { color: var(--good); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 20px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile .value { font-size: 26px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .label, .tile .note { font-size: 13px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 13px; color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line);
     padding: 6px 18px 6px 0; vertical-align: bottom; }
td { padding: 7px 18px 7px 0; border-bottom: 1px solid #eef1f5; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
tr.total td { font-weight: 600; border-top: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
.steps td:first-child { width: 26%; }
.steps td.number, .steps td.number + td { width: 11%; }
.when { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.badge { display: inline-block; border-radius: 20px; padding: 1px 9px; font-size: 12.5px; background: #edf0f5;
         color: var(--soft); white-space: nowrap; }
.badge.good { background: var(--good-ground); color: var(--good); }
.drops { display: flex; flex-wrap: wrap; gap: 5px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12.5px; }
pre { background: var(--ground); border: 1px solid var(--line); border-radius: 8px; padding: 14px; overflow-x: auto;
      margin: 0; }
img { width: 100%; height: auto; display: block; }
.sample { border: 1px solid var(--line); border-radius: 8px; margin-top: 14px; overflow: hidden; break-inside: avoid; }
.prompt .badge { margin-top: 8px; background: #e6eaf0; }
.prompt { background: var(--ground); padding: 12px 16px; border-bottom: 1px solid var(--line); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: 1fr 1fr; }
.answer { padding: 12px 16px; }
.answer + .answer { border-left: 1px solid var(--line); }
.answer header { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin-bottom: 6px; }
details summary { cursor: pointer; font-weight: 600; }
details pre, details .scroll { margin-top: 14px; }
@media (max-width: 700px) { .answers { grid-template-columns: 1fr; }
                            .answer + .answer { border-left: 0; border-top: 1px solid var(--line); } }
@media print { body { background: #fff; font-size: 12px; } main { max-width: none; padding: 0; }
               section { padding: 12px 0; border: 0; border-top: 1px solid var(--line); border-radius: 0; }
               .tile, tr, img { break-inside: avoid; } pre { white-space: pre-wrap; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run.name }}: {{ run.flow_run }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ run.name }}</h1>
<div class="soft">Run {{ run.flow_run }}, written {{ written }}. {{ total }} of work in this run.</div>
<div class="verdict {{ 'promoted' if run.promoted }}">
  <b>{{ "New champion" if run.promoted else "Champion unchanged" }}</b><span>{{ run.verdict }}</span>
</div>

{% if tiles %}
<div class="tiles">
{% for label, value, note in tiles %}
  <div class="tile">
    <div class="label">{{ label }}</div><div class="value">{{ value }}</div><div class="note">{{ note }}</div>
  </div>
{% endfor %}
</div>
{% endif %}

<section>
<h2>Steps</h2>
<div class="scroll"><table class="steps">
<tr><th>Step</th><th class="number">Time</th><th></th><th>Main metric</th></tr>
{% for row in run.rows %}
<tr><td>{{ row.step }}</td><td class="number">{{ row.seconds | duration }}</td>
  <td>{% if row.cached %}<span class="badge">cached</span>{% endif %}</td><td>{{ row.metric }}</td></tr>
{% endfor %}
</table></div>
{% if run.rows | selectattr("cached") | list %}
<p class="soft">The time of a cached step is what it took when it was made.</p>
{% endif %}
{% if run.versions %}
<h3>Registered</h3>
<div class="scroll"><table>
{% for name, version in run.versions.items() %}
<tr><td>{{ name }}</td><td>version {{ version }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
</section>

{% if comparison %}
<section>
<h2>Evaluation: PPO against SFT</h2>
<div class="scroll"><table>
<tr><th>{{ evaluate.prompts }} held-out prompts</th><th class="number">SFT</th><th class="number">PPO</th>
  <th class="number">Difference</th></tr>
{% for label, sft, ppo, difference in comparison %}
<tr><td>{{ label }}</td><td class="number">{{ sft }}</td><td class="number">{{ ppo }}</td>
  <td class="number">{{ difference }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">Both models answer the same prompts. The reward model scores the answers, and the one with the higher
score wins the prompt; a tie counts half. 0 is the mean score of the held-out preferred answers.</p>
</section>
{% endif %}

{% if reward %}
<section>
<h2>Reward model</h2>
<div class="scroll"><table>
<tr><th>Which answer did people prefer?</th><th class="number">Accuracy</th></tr>
<tr><td>Reward model, {{ "{:,}".format(reward.eval_pairs) }} held-out pairs</td>
  <td class="number">{{ "%.1f" | format(reward.accuracy * 100) }} %
  {%- if reward.accuracy_interval is defined %} ± {{ "%.1f" | format(reward.accuracy_interval * 100) }}{% endif %}</td>
</tr>
{% if reward.length_accuracy is defined %}
<tr><td>Always the longer answer</td><td class="number">{{ "%.1f" | format(reward.length_accuracy * 100) }} %</td></tr>
{% endif %}
{% for source, accuracy in (reward.accuracy_per_source or {}).items() %}
<tr><td class="soft">Reward model on {{ source }}</td>
  <td class="number soft">{{ "%.1f" | format(accuracy * 100) }} %</td></tr>
{% endfor %}
</table></div>
</section>
{% endif %}

{% if curves %}
<section>
<h2>Curves</h2>
<img alt="Losses of SFT and reward model; reward, KL and losses of PPO" src="data:image/png;base64,{{ curves }}">
<p class="soft">Light: every step. Dark: smoothed.</p>
</section>
{% endif %}

{% if samples %}
<section>
<h2>Answers side by side</h2>
<div class="soft">Held-out prompts, from PPO's clearest loss against SFT to its clearest win, evenly spaced.</div>
{% for sample in samples %}
<div class="sample">
  <div class="prompt"><div class="text">{{ sample.prompt }}</div><span class="badge">{{ sample.source }}</span></div>
  <div class="answers">
  {% for answer in sample.answers %}
    <div class="answer">
      <header><b>{{ answer.label }}</b>
        <span class="badge {{ 'good' if sample.winner == answer.name }}">reward {{ answer.reward }}
        {%- if sample.winner == answer.name %}, wins{% endif %}</span>
        {% if answer.true_score is not none %}<span class="badge">true score {{ answer.true_score }}</span>{% endif %}
        {% if answer.tokens is not none %}<span class="badge">{{ answer.tokens }} tokens</span>{% endif %}
        {% if not answer.ended %}<span class="badge">cut off</span>{% endif %}
      </header>
      <div class="text">{{ answer.text or "(empty)" }}</div>
    </div>
  {% endfor %}
  </div>
</div>
{% endfor %}
</section>
{% endif %}

{% if data %}
<section>
<h2>Data</h2>
<div class="scroll"><table>
<tr><th>Source</th><th class="number">Rows in</th><th class="number">Kept</th>
  <th>Dropped, by reason</th></tr>
{% for line in data %}
<tr class="{{ 'total' if line.is_total }}"><td>{{ line.name }}</td>
  <td class="number">{{ "{:,}".format(line.rows_in) }}</td>
  <td class="number">{{ "{:,}".format(line.kept) }}</td>
  <td><div class="drops">{% for reason, count in line.counts.most_common() %}
    <span class="badge">{{ reason | replace("_", " ") }} {{ "{:,}".format(count) }}</span>{% endfor %}</div></td></tr>
{% endfor %}
</table></div>
{% if phases %}
<h3>Rows per phase, tokenised</h3>
<div class="scroll"><table>
<tr><th>Phase</th><th class="number">Train</th><th class="number">Held out</th></tr>
{% for name, train, held_out in phases %}
<tr><td>{{ name }}</td><td class="number">{{ train }}</td><td class="number">{{ held_out }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
</section>
{% endif %}

<section>
<h2>Lineage</h2>
<div class="soft">Code: {{ code.commits | join("; ") }}.
{% for name, version in code.versions.items() %}{{ name }} {{ version }}{{ "" if loop.last else ", " }}{% endfor %}.
{% if run.run_id %}MLflow run {% if run.run_url %}<a href="{{ run.run_url }}">{{ run.run_id }}</a>
{% else %}<code>{{ run.run_id }}</code>{% endif %}.{% endif %}</div>
<div class="scroll"><table>
<tr><th>Stage</th><th>Fingerprint</th><th class="when">Digest of its files</th><th>Reads</th>
  <th class="when">Made (UTC)</th></tr>
{% for line in lineage %}
<tr><td>{{ line.key }}</td><td><code title="{{ line.path }}">{{ line.fingerprint }}</code></td>
  <td><code>{{ line.digest }}</code></td><td>{{ line.inputs }}</td><td class="soft when">{{ line.made }}</td></tr>
{% endfor %}
</table></div>
</section>

<section>
<details><summary>Config</summary><pre>{{ run.config }}</pre></details>
</section>
</main>
</body>
</html>
"""
