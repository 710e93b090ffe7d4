"""Clean sources to one set: shared groups joined, copies and leaks dropped, weights applied.

The public sets overlap (about 90 % of rm-static's test rows stand in full-hh-rlhf's train), so what is one prompt and
what is held out can only be said across all of them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.keys import fraction, messages_digest, prompt_group
from data_prep.tables import PAIR_SCHEMA, iter_rows, table_writer, write_table

SIDES = ("train", "test")
GROUPS_SCHEMA = pa.schema([("name", pa.string()), ("group", pa.string())])


class Groups:
    """Groups that merge where rows join them (union-find); a merged group bears the smallest of its names."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The merged group that `name` belongs to."""
        parent = self._parent
        root = name
        while parent.get(root, root) != root:
            root = parent[root]
        while parent.get(name, name) != root:  # later look-ups then take one step
            parent[name], name = root, parent[name]
        return root

    def join(self, first: str, second: str) -> None:
        low, high = sorted((self.of(first), self.of(second)))
        if low != high:
            self._parent[high] = low

    def merged(self) -> Iterator[tuple[str, str]]:
        """Every name that gave way to another, with the group that it belongs to now, in order."""
        return ((name, self.of(name)) for name in sorted(self._parent) if self.of(name) != name)


def blend(cleaned: Mapping[str, Path], weights: Mapping[str, float], seed: int, out: Path) -> dict[str, Any]:
    """Write train.arrow and test.arrow (`tables.PAIR_SCHEMA`) from the cleaned folders of the sources, in their order,
    and groups.arrow (`GROUPS_SCHEMA`): the names that were merged into a group of another name.

    weights: by source, 1 where not named.  Up to 1 it is the share of train groups taken (chosen by a hash of seed and
    group, so that it stays as it is when rows arrive); above 1 all are taken and it becomes their `weight` in the loss.
    Test rows are all taken.  Drops: leak (a train row of a group that some source holds out), unselected (by weight),
    duplicate (the same pair from an earlier source).  Returns {"sources": {name: {"train" | "test": {"rows_in", "kept",
    "drops"}}}, "train", "test", "groups", "leak"}.  ValueError for an unknown name, a weight <= 0, or nothing left.
    """
    _check_weights(cleaned, weights)
    groups, held_out = _groups(cleaned)
    seen: set[bytes] = set()
    counts = {name: {side: _Count() for side in SIDES} for name in cleaned}
    for side in SIDES:
        with table_writer(out / f"{side}.arrow", PAIR_SCHEMA) as writer:
            for name, row in _rows(cleaned, side):
                group = groups.of(row["group"])
                weight = weights.get(name, 1.0)
                reason = _reason(side, group, weight, seed, held_out) or _duplicate(row, seen)
                counts[name][side].add(reason)
                if reason is None:
                    writer.append({**row, "group": group, "weight": max(weight, 1.0)})
    write_table(
        ({"name": name, "group": group} for name, group in groups.merged()), out / "groups.arrow", GROUPS_SCHEMA
    )
    metrics: dict[str, Any] = {
        "sources": {name: {side: count.metrics() for side, count in sides.items()} for name, sides in counts.items()}
    }
    for side in SIDES:
        metrics[side] = sum(sides[side].kept for sides in counts.values())
    metrics["leak"] = sum(sides["train"].drops["leak"] for sides in counts.values())
    metrics["groups"] = len({row["group"] for side in SIDES for row in iter_rows(out / f"{side}.arrow", ["group"])})
    if not metrics["train"]:
        raise ValueError(
            f"No train row is left after blending {', '.join(cleaned)}: raise data weights or add a source."
        )
    return metrics


def _check_weights(cleaned: Mapping[str, Path], weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if name not in cleaned:
            raise ValueError(f"There is a weight for {name}, which is no source: known are {', '.join(cleaned)}.")
        if not 0 < weight < float("inf"):
            raise ValueError(f"The weight of {name} is {weight}; it has to be above 0 (leave a source out to drop it).")


def _rows(cleaned: Mapping[str, Path], side: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, folder in cleaned.items():
        for row in iter_rows(folder / f"{side}.arrow"):
            yield name, row


def _groups(cleaned: Mapping[str, Path]) -> tuple[Groups, set[str]]:
    """The merged groups of all rows, and those of them that a source holds out for its test."""
    groups = Groups()
    tested = []
    for side in SIDES:
        for folder in cleaned.values():
            for row in iter_rows(folder / f"{side}.arrow", ["prompt", "group"]):
                groups.join(row["group"], prompt_group(row["prompt"]))
                if side == "test":
                    tested.append(row["group"])
    return groups, {groups.of(group) for group in tested}


class _Count:
    """Rows in, kept and dropped by reason."""

    def __init__(self) -> None:
        self.kept = 0
        self.drops: Counter[str] = Counter()

    def add(self, reason: str | None) -> None:
        if reason is None:
            self.kept += 1
        else:
            self.drops[reason] += 1

    def metrics(self) -> dict[str, Any]:
        return {
            "rows_in": self.kept + sum(self.drops.values()),
            "kept": self.kept,
            "drops": dict(sorted(self.drops.items())),
        }


def _reason(side: str, group: str, weight: float, seed: int, held_out: set[str]) -> str | None:
    if side == "train" and group in held_out:
        return "leak"
    if side == "train" and fraction("weight", str(seed), group) >= weight:
        return "unselected"
    return None


def _duplicate(row: dict[str, Any], seen: set[bytes]) -> str | None:
    """Whether an earlier row, of either side, is the same pair; the row counts as seen from now on."""
    key = messages_digest(row["prompt"], row["chosen"], row["rejected"])
    if key in seen:
        return "duplicate"
    seen.add(key)
    return None
