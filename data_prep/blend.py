"""Clean sources to one set: shared groups joined, copies and leaks dropped, weights applied.

The public sets overlap (about 90 % of rm-static's test rows stand in full-hh-rlhf's train), so what is one prompt and
what is held out can only be said across all of them.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.groups import SIDES, grouped, kinds, rows_of
from data_prep.keys import fraction, messages_digest
from data_prep.spread import Mapper
from data_prep.tables import PAIR_SCHEMA, iter_rows, table_writer, write_table

GROUPS_SCHEMA = pa.schema([("name", pa.string()), ("group", pa.string())])


def blend(
    cleaned: Mapping[str, Path], weights: Mapping[str, float], seed: int, out: Path, mapped: Mapper = map
) -> dict[str, Any]:
    """Write train.arrow and test.arrow (`tables.PAIR_SCHEMA`) from the cleaned folders of the sources, in their order,
    and groups.arrow (`GROUPS_SCHEMA`): the names that were merged into a group of another name.

    weights: by source, 1 where not named.  Up to 1 it is the share of train groups taken (chosen by a hash of seed and
    group, so that it stays as it is when rows arrive); above 1 all are taken and their pairs' `weight` in a reward
    model's loss is times that.  Test rows are all taken.  Drops: leak (a train row of a group that some source holds
    out), unselected (by weight), contradicted (near-duplicates of the two answers are preferred the other way round
    somewhere), duplicate (the same pair from an earlier source), near_duplicate (one with a like prompt, like chosen
    and like rejected answer).
    Returns {"sources": {name: {"train" | "test": {"rows_in", "kept", "drops"}}}, "train", "test", "groups", "leak",
    "leaked_tests"}; the last are the test rows that the dropped train rows would have given away.
    mapped: `map`, or another that searches for near-duplicates elsewhere.  ValueError for an unknown name, a weight
    <= 0, or nothing left.
    """
    _check_weights(cleaned, weights)
    found = grouped(cleaned, mapped)
    seen = _Seen(kinds(cleaned, found, mapped))
    counts = {name: {side: _Count() for side in SIDES} for name in cleaned}
    with ExitStack() as stack:
        writers = {side: stack.enter_context(table_writer(out / f"{side}.arrow", PAIR_SCHEMA)) for side in SIDES}
        for place, (side, name, row) in enumerate(rows_of(cleaned)):
            group = found.groups.of(row["group"])
            weight = weights.get(name, 1.0)
            reason = _reason(side, group, weight, seed, found.held_out) or seen.reason(place, row)
            counts[name][side].add(reason)
            if reason is None:
                writers[side].append({**row, "group": group, "weight": row["weight"] * max(weight, 1.0)})
    merged = ({"name": name, "group": group} for name, group in found.groups.merged())
    write_table(merged, out / "groups.arrow", GROUPS_SCHEMA)
    metrics: dict[str, Any] = {
        "sources": {name: {side: count.metrics() for side, count in sides.items()} for name, sides in counts.items()}
    }
    for side in SIDES:
        metrics[side] = sum(sides[side].kept for sides in counts.values())
    metrics["leak"] = sum(sides["train"].drops["leak"] for sides in counts.values())
    written = {side: {row["group"] for row in iter_rows(out / f"{side}.arrow", ["group"])} for side in SIDES}
    assert not written["train"] & written["test"], "a group of a test row was trained on"
    metrics["leaked_tests"] = found.leaked_tests
    metrics["groups"] = sum(map(len, written.values()))
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


class _Seen:
    """The rows that were taken so far, to tell copies of them."""

    def __init__(self, kinds: NDArray[np.int64]) -> None:
        """`kinds` are numbers of prompt, chosen and rejected answer by row, -1 for answers that nothing is like."""
        self._kinds = kinds
        every = {(prompt, chosen, rejected) for prompt, chosen, rejected in kinds.tolist() if chosen != rejected}
        self._contradicted = {kind for kind in every if (kind[0], kind[2], kind[1]) in every}
        self._exact: set[bytes] = set()
        self._near: set[tuple[int, ...]] = set()

    def reason(self, place: int, row: dict[str, Any]) -> str | None:
        """Why the row at a place is not taken; a row that is counts as seen from now on."""
        kind = tuple(self._kinds[place].tolist())
        if kind in self._contradicted:
            return "contradicted"
        exact = messages_digest(row["prompt"], row["chosen"], row["rejected"])
        if exact in self._exact:
            return "duplicate"
        if kind in self._near:
            return "near_duplicate"
        self._exact.add(exact)
        if kind[1] >= 0:
            self._near.add(kind)
        return None
