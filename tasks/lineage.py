"""Where a model came from: the stages behind it, from the manifests that each of them left.

`gather` walks from a stage directory to all that it was made from. Registering a model writes that record into the
model's own folder (`lineage.json`), so that the answer outlives Prefect's events (7 days), cleared stage directories
and the move to another machine. A record is plain JSON:

    {"root": "ppo/1f0c...", "steps": {"ppo/1f0c...": {stage, fingerprint, digest, inputs: {role: step}, config, code,
                                                      versions, metrics, started, seconds, made_by}, ...}}

A step is named `stage/fingerprint`, every step after those that it was made from.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks import tracking
from tasks.headlines import headline
from tasks.stages import named, read_manifest, write_json
from tasks.tracking import Store, Version

LINEAGE_FILE = "lineage.json"
KEPT = ("stage", "fingerprint", "digest", "config", "code", "versions", "metrics", "started", "seconds", "made_by")
"""What a step's record takes from its manifest; the list of files stays where the files are."""

Record = Mapping[str, Any]


class DataSource(NamedTuple):
    """A preference set as a model was made from it."""

    name: str
    revision: str
    """The commit on the hub, or "local"."""
    rows: int
    """Rows that were read."""
    kept: int | None
    """Pairs left after cleaning; None where the set was not cleaned."""
    step: str


def gather(directory: Path) -> dict[str, Any]:
    """The record of the stage directory, walked by the manifests in its workspace.

    Raises ValueError where a stage that it was made from is gone or was made anew with other results since.
    """
    steps: dict[str, dict[str, Any]] = {}
    root = _walk(directory, directory.parent.parent, None, steps)
    return {"root": root, "steps": steps}


def write(folder: Path, directory: Path) -> dict[str, Any]:
    """Keep the record of the stage `directory` in a model's folder. Returns it."""
    record = gather(directory)
    write_json(folder / LINEAGE_FILE, record)
    return record


def of_version(store: Store, version: Version) -> dict[str, Any]:
    """The record that a registered version keeps. Raises ValueError where it has none or its files are gone."""
    text = tracking.read_file(store, version, LINEAGE_FILE)
    if text is None:
        raise ValueError(
            f"{version.name} version {version.version} keeps no {LINEAGE_FILE} at {version.source}: its files are "
            "gone, or it was registered by an earlier release; its tags still name its stages"
        )
    record = json.loads(text)
    return {"root": record["root"], "steps": dict(record["steps"])}


def sources(record: Record) -> list[DataSource]:
    """The preference sets behind a model, with the revision and the rows that went in."""
    steps: Mapping[str, Any] = record["steps"]
    kept = {
        step["inputs"]["raw"]: step["metrics"]["total"]["kept"] for step in steps.values() if step["stage"] == "clean"
    }
    return [
        DataSource(
            step["config"]["source"],
            step["metrics"]["revision"],
            sum(step["metrics"]["rows"].values()),
            kept.get(name),
            name,
        )
        for name, step in steps.items()
        if step["stage"] == "download"
    ]


def bases(record: Record) -> list[tuple[str, str]]:
    """The base models behind a model, as (name or shape, revision)."""
    return [_base(step) for step in record["steps"].values() if step["stage"] == "base"]


def commits(record: Record) -> list[str]:
    """The code commits that the steps ran, each once; "+changes" where files were not committed."""
    found = [commit(step) for step in record["steps"].values()]
    return list(dict.fromkeys(name for name in found if name))


def commit(step: Mapping[str, Any]) -> str:
    """The code commit that a step ran, shortened; empty where there was no git."""
    code = step.get("code", {})
    return f"{code['commit'][:10]}{'+changes' if code.get('dirty') else ''}" if "commit" in code else ""


def children(record: Record, step: str) -> list[tuple[str, str]]:
    """(role, step) of what a step was made from; the role is empty where the stage's name says as much."""
    read = record["steps"][step]["inputs"].items()
    return [("" if _says_no_more(role, child) else f"{role}: ", child) for role, child in read]


def _says_no_more(role: str, step: str) -> bool:
    stage = step.partition("/")[0]
    return role in (stage, "raw") or stage == "clean"


def impact(store: Store, source: str, revision: str | None) -> list[tuple[Version, DataSource]]:
    """The registered versions that a set went into, newest first by model: what is to be withdrawn with it.

    Args:
        source: name of the set.
        revision: its commit or the beginning of it; None: any.

    Raises ValueError that names what there is where no version comes from such a set.
    """
    found, known = [], set()
    for name in tracking.registered_names(store):
        for version in tracking.versions(store, name):
            for made_from in _sources_if_kept(store, version):
                known.add(f"{made_from.name}@{made_from.revision}")
                if made_from.name == source and made_from.revision.startswith(revision or ""):
                    found.append((version, made_from))
    if not found:
        asked = source + (f"@{revision}" if revision else "")
        raise ValueError(f"No registered model comes from {asked}. Known: {', '.join(sorted(known)) or 'none'}.")
    return found


def _sources_if_kept(store: Store, version: Version) -> Iterable[DataSource]:
    try:
        return sources(of_version(store, version))
    except ValueError:
        return []  # registered before records were kept


def _walk(directory: Path, workspace: Path, digest: str | None, steps: dict[str, dict[str, Any]]) -> str:
    """Add the stage directory, after all that it was made from. Returns its step."""
    name = f"{directory.parent.name}/{directory.name}"
    if name in steps:
        return name
    manifest = read_manifest(directory)
    if manifest is None:
        raise ValueError(f"the stage {name} is not in {workspace}: it was cleared away, or lies in another workspace")
    if digest not in (None, manifest["digest"]):
        raise ValueError(f"the stage {name} was made anew since, with other results")
    inputs = {
        role: _walk(named(workspace, read["stage"], read["fingerprint"]), workspace, read["digest"], steps)
        for role, read in manifest["inputs"].items()
    }
    if (ancestor := _ancestor(manifest)) is not None:
        steps |= {step: kept for step, kept in ancestor["steps"].items() if step not in steps}
        inputs["started from"] = ancestor["root"]
    kept = {key: manifest[key] for key in KEPT if key in manifest}
    steps[name] = tracking.redacted(kept) | {"inputs": inputs}
    return name


def _ancestor(manifest: Mapping[str, Any]) -> Record | None:
    """The record of the registered model that a base model is, if it is one (`tasks.registered`) and keeps a record."""
    if not str(manifest["config"].get("revision")).startswith("models:/"):
        return None
    file = Path(manifest["config"]["model"]).parent / LINEAGE_FILE
    record: Record | None = json.loads(file.read_text()) if file.is_file() else None
    return record


def _base(step: Mapping[str, Any]) -> tuple[str, str]:
    model = step["config"]["model"]
    if str(step["config"].get("revision")).startswith("models:/"):
        return str(step["config"]["revision"]), ""  # the folder that it was read from says less
    if isinstance(model, str):
        return model, str(step["metrics"].get("revision") or step["config"].get("revision") or "local")
    return "random weights, " + ", ".join(f"{key} {value}" for key, value in model.items()), ""


def markdown(record: Record, pages: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda made_by: {}) -> str:
    """The record as a nested Markdown list, each step once: what Prefect shows of a run's models.

    Args:
        pages: what a step's record says of the run that made it -> title and address of the pages about that run.
    """

    def lines(name: str, role: str, depth: int) -> Iterator[str]:
        step = record["steps"][name]
        if name in seen:
            yield f"{'  ' * depth}- {role}**{step['stage']}** `{step['fingerprint']}`, see above"
            return
        seen.add(name)
        links = [f"[{title}]({address})" for title, address in pages(step.get("made_by", {})).items()]
        said = " · ".join([*facts(step), *links])
        yield f"{'  ' * depth}- {role}**{step['stage']}** `{step['fingerprint']}` {said}"
        for role, child in children(record, name):
            yield from lines(child, role, depth + 1)

    seen: set[str] = set()
    return "\n".join(lines(record["root"], "", 0)) + "\n"


def facts(step: Mapping[str, Any]) -> list[str]:
    """What there is to say of a step in a line: data revision or base model, main figure, time, code."""
    said = [headline(step["stage"], step["metrics"])]
    if step["stage"] == "download":
        said.insert(0, f"{step['config']['source']}@{step['metrics']['revision']}")
    if step["stage"] == "clean":
        said.insert(0, step["config"]["source"])
    if step["stage"] == "base":
        said.insert(0, "@".join(part for part in _base(step) if part))
    code = commit(step)
    said += [step["started"][:16].replace("T", " "), f"code {code}" if code else ""]
    return [text for text in said if text]
