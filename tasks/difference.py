"""What sets two registered versions apart: their figures side by side, and what was different on the way to them."""

from collections.abc import Iterator, Mapping
from typing import Any

from tasks.lineage import Record, commit
from tasks.tracking import Version, flattened

Line = tuple[str, str, str]
"""What it is, of the first version, of the second; empty where a version has none."""


def measured(first: Version, second: Version) -> list[Line]:
    """The figures of both versions, by the tags that registration and promotion left."""
    lines = []
    for prefix, title in (("metric.", ""), ("gate.", "gate ")):
        names = sorted(name for name in {**first.tags, **second.tags} if name.startswith(prefix))
        lines += [(title + n.removeprefix(prefix), first.tags.get(n, ""), second.tags.get(n, "")) for n in names]
    return lines


def made(first: Record, second: Record) -> list[Line]:
    """The settings, data revisions and code commits of the steps that differ, named `step.setting`."""
    left, right = _facts(first), _facts(second)
    names = dict.fromkeys([*left, *right])
    return [(n, left.get(n, ""), right.get(n, "")) for n in names if left.get(n) != right.get(n)]


def _facts(record: Record) -> dict[str, str]:
    facts: dict[str, str] = {}
    for step in record["steps"].values():
        source = step["config"].get("source")
        name = f"{step['stage']} {source}" if source else step["stage"]
        facts |= {f"{name}.{key}": value for key, value in _of_step(step)}
    return facts


def _of_step(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    # What lies under the stage's own name, such as ppo.kl_coef, is named as in the run's config.
    for key, value in flattened(step["config"]):
        yield key.removeprefix(f"{step['stage']}."), value
    if step["stage"] == "download":
        yield "revision read", str(step["metrics"].get("revision", ""))
    if code := commit(step):
        yield "code", code
