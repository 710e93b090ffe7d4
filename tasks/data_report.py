"""What the prepared data came to: tables from the stages' metrics, and the report that is written once per data set.

The report is a stage directory of its own, `data-report/<fingerprint>/`, beside the prepared stages and not in the
graph: nothing reads it but people.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import dag, page
from tasks.config import RunConfig
from tasks.stages import Stage, StageRef, run

if TYPE_CHECKING:
    import pandas as pd

PAGE, FIGURES = "data.html", "figures.png"
ROOTS = ("tasks.data_report", "tasks.data_figures", "data_prep.stats")
STAGES = ("download", "clean", "blend", "split", "tokenise")
PHASES = {"sft": "SFT", "reward": "Reward model", "ppo": "PPO (prompts)", "judge": "Judge"}


@dataclass(frozen=True)
class Table:
    """A table as the page shows it: texts, the first `names` columns of which are names."""

    columns: list[str]
    lines: list[list[str]]
    names: int


def make(config: RunConfig, refs: Mapping[str, StageRef]) -> StageRef:
    """The report of a run's data as a finished stage. `refs` are the prepared stages by key, up to `tokenise`."""
    read = {key: ref for key, ref in refs.items() if ref.stage in STAGES}
    # Counts of dropped rows are in no output file: the fingerprints tell what was counted, the digests what was left.
    settings = {"name": config.name, "stages": {key: ref.fingerprint for key, ref in read.items()}}
    stage = Stage("data-report", dag.workspace(config), settings, read, ROOTS, config.remote)
    return run(stage, lambda directory: _write(directory, config.name, refs))


def _write(directory: Path, name: str, refs: Mapping[str, StageRef]) -> dict[str, Any]:
    from data_prep import stats
    from tasks import data_figures

    rows = stats.phase_table(refs["tokenise"].directory)
    lengths = stats.token_lengths(refs["tokenise"].directory)
    preferences = stats.preference_table(refs["split"].directory / "reward-train.arrow")
    picture = data_figures.draw(rows, _dropped(refs), lengths, preferences)
    (directory / FIGURES).write_bytes(picture)
    html = page.render(
        "data.html",
        name=name,
        data=data_table(refs),
        phases=phase_table(refs),
        picture=picture,
        tables=[
            ("Rows per phase", "Tokenised rows: train and held out.", _shown(rows.reset_index(names="source"))),
            (
                "Tokens per train row",
                "A sequence is prompt and answer; a pair is both sequences that the reward model reads.",
                _shown(stats.token_table(lengths).reset_index(), names=3),
            ),
            (
                "Preferences",
                "The reward model's train pairs. Those of one prompt often share answers, which it soon knows by "
                "heart: max_pairs_per_prompt of a source limits them. Prompts that are nearly equal count as one, "
                "and one of several sources counts once in the total. How often the longer of two answers of "
                "different length is the preferred one is what a reward model that knows nothing but length gets "
                "right.",
                _shown(
                    preferences.reset_index(),
                    forms={"longer_chosen": page.percent, "pairs_per_prompt": "{:.1f}".format},
                ),
            ),
        ],
    )
    (directory / PAGE).write_text(html, encoding="utf-8")
    return {"longer_chosen": preferences["longer_chosen"].to_dict()["total"]}


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
    phases = metrics_of(refs, "tokenise")
    return [
        (title, *(f"{phases[name].get(side, {}).get('kept', 0):,}" for side in ("train", "eval")))  # type: ignore[misc]
        for name, title in PHASES.items()
        if name in phases
    ]


def markdown(refs: Mapping[str, StageRef], made: StageRef) -> str:
    """The report's heart as Prefect shows it, with the way to the whole."""
    lines = ["| Source | Rows in | Kept | Dropped |", "|---|--:|--:|---|"]
    for line in data_table(refs):
        drops = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in line["counts"].most_common())
        lines.append(f"| {line['name']} | {line['rows_in']:,} | {line['kept']:,} | {drops} |")
    lines += ["", "| Phase | Train | Held out |", "|---|--:|--:|"]
    lines += [f"| {name} | {train} | {held_out} |" for name, train, held_out in phase_table(refs)]
    longer = page.percent(made.metrics["longer_chosen"])
    lines += ["", f"The longer answer is the preferred one in {longer} of the reward model's train pairs.", ""]
    return "\n".join([*lines, f"Report: `{made.directory / PAGE}`"]) + "\n"


def metrics_of(refs: Mapping[str, StageRef], key: str) -> Mapping[str, Any]:
    """The metrics of a stage; none where the run has not made it."""
    return refs[key].metrics if key in refs else {}


def _dropped(refs: Mapping[str, StageRef]) -> Counter[str]:
    """Rows dropped by reason, over all sources, from cleaning to tokenising."""
    drops: Counter[str] = Counter()
    for line in data_table(refs):
        if not line["is_total"]:
            drops.update(line["counts"])
    for sides in metrics_of(refs, "tokenise").values():
        for counts in sides.values():
            drops.update(counts["drops"])
    return drops


def _data_line(name: str, rows_in: int, kept: int, drops: Mapping[str, int]) -> dict[str, Any]:
    counts = Counter({reason: count for reason, count in drops.items() if count})
    return {"name": name, "rows_in": rows_in, "kept": kept, "counts": counts, "is_total": False}


def _shown(table: "pd.DataFrame", names: int = 1, forms: Mapping[str, Callable[[float], str]] | None = None) -> Table:
    """A table of numbers as texts, whole where `forms` has nothing for their column; the first columns are `names`."""
    form_of = [str] * names + [(forms or {}).get(str(column), "{:,.0f}".format) for column in table.columns[names:]]
    lines = [[form(value) for form, value in zip(form_of, line, strict=True)] for line in table.itertuples(index=False)]
    return Table([str(column).replace("_", " ") for column in table.columns], lines, names)
