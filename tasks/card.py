"""The model card of a registered model: what it is, what it was made from, how it did. Markdown, from manifests."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks import lineage
from tasks.headlines import headline
from tasks.stages import StageRef, read_manifest

TRAINED = ("sft", "reward", "gold", "ppo")
SETTINGS = ("epochs", "max_steps", "steps", "batch_size", "kl_coef", "ptx_coef", "ema_decay")
"""What a card says of a training stage's config, beside its learning rates and adapters."""


@dataclass(frozen=True)
class Licences:
    """Under which licences a model was made."""

    sets: Mapping[str, str]
    base: str
    """Of the base model."""


def card(
    title: str,
    purpose: str,
    measured: Sequence[tuple[str, Any]],
    gates: Mapping[str, str],
    record: lineage.Record,
    licences: Licences,
    made_from: Mapping[str, StageRef],
) -> str:
    """The card as Markdown.

    Args:
        measured: what to say of its quality, name and value.
        gates: what its run wanted of it, measure -> sentence.
        record: of the stage that made it (`tasks.lineage`).
        made_from: role -> stage that the model comes from, the nearest last.
    """
    lines = [f"# {title}", "", purpose, "", "## Use", ""]
    lines += [
        "`model/` is a Hugging Face folder: `transformers` and vLLM load it. MLflow loads the folder above it:",
        f"`mlflow models serve -m models:/{title}@champion`.",
    ]
    lines += ["", "## Measured", "", "On held-out rows, by `evaluate` and the reward model's own evaluation.", ""]
    lines += _table(("", ""), ((name, _text(value)) for name, value in measured))
    lines += [
        "",
        "## Gates",
        "",
        "What its run wanted of it; the version's description and tags in the registry say how it did.",
        "",
    ]
    lines += _table(("", "Wanted"), ((name.replace("_", " "), wanted) for name, wanted in gates.items()))
    lines += ["", "## Data", ""]
    lines += _table(("Set", "Revision", "Rows read", "Pairs kept", "Licence"), _sets(record, licences.sets))
    lines += ["", "## Training", ""]
    named = ", ".join("@".join(part for part in base if part) for base in lineage.bases(record)) or "none"
    lines += [f"Base model: {named}; licence: {licences.base}.", ""]
    lines += _table(("Stage", "Settings", "Result"), _training(record))
    lines += ["", "## Made from", ""]
    lines += _table(("", "Stage", "Fingerprint", "Digest", "Code"), (_stage(*entry) for entry in made_from.items()))
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *cells] if cells else ["None."]


def _sets(record: lineage.Record, licences: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for source in lineage.sources(record):
        kept = "" if source.kept is None else f"{source.kept:,}"
        yield source.name, source.revision, f"{source.rows:,}", kept, licences[source.name]


def _training(record: lineage.Record) -> Iterator[tuple[str, str, str]]:
    for step in record["steps"].values():
        if step["stage"] in TRAINED:
            section = step["config"].get("reward" if step["stage"] == "gold" else step["stage"], {})
            said = [f"{name} {section[name]}" for name in SETTINGS if section.get(name) is not None]
            said += [
                f"{name.replace('optimizer', 'learning rate').replace('_', ' ')} {value['learning_rate']:g}"
                for name, value in section.items()
                if name.endswith("optimizer")
            ]
            said += [
                f"{name} rank {value['rank']}" for name, value in section.items() if name.endswith("lora") and value
            ]
            yield step["stage"], ", ".join(said), headline(step["stage"], step["metrics"])


def _stage(role: str, ref: StageRef) -> tuple[str, ...]:
    code = (read_manifest(ref.directory) or {}).get("code", {})
    commit = f"{code['commit'][:10]}{' and changes' if code.get('dirty') else ''}" if "commit" in code else "no commit"
    return role, ref.stage, ref.fingerprint, ref.digest[:16], commit


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
