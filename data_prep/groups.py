"""What belongs together across all sources: rows with one prompt, one post, or prompts that are almost the same.

A group is split as a whole, so what is not found here can leak from train to test.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep import dedup
from data_prep.conversation import Message
from data_prep.keys import messages_digest, prompt_group
from data_prep.tables import iter_rows

SIDES = ("train", "test")


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


class Grouped(NamedTuple):
    """The rows of all sources, grouped."""

    groups: Groups
    prompts: Mapping[str, int]
    """Exact prompt's group -> a number that near-duplicate prompts share."""
    held_out: set[str]
    """Groups with a test row."""
    rows: Counter[str]
    """Group -> its rows, of either side."""
    leaked_tests: int
    """Test rows whose group has train rows as well: what would leak if these stayed."""


def grouped(cleaned: Mapping[str, Path]) -> Grouped:
    """Group the rows of the cleaned folders {source: folder with train.arrow and test.arrow}."""
    groups = Groups()
    names: dict[str, int] = {}
    signatures = []
    for _, _, row in rows_of(cleaned, ["prompt", "group"]):
        name = prompt_group(row["prompt"])
        groups.join(row["group"], name)
        if name not in names:
            names[name] = len(names)
            signatures.append(dedup.signature(text_of(row["prompt"])))
    labels = dedup.clusters(np.stack(signatures)) if signatures else np.empty(0, np.int64)
    ordered = list(names)
    for place in np.flatnonzero(labels != np.arange(len(labels))):
        groups.join(ordered[place], ordered[labels[place]])
    by_side = {side: Counter[str]() for side in SIDES}
    for side, _, row in rows_of(cleaned, ["group"]):
        by_side[side][groups.of(row["group"])] += 1
    return Grouped(
        groups,
        {name: int(labels[place]) for name, place in names.items()},
        set(by_side["test"]),
        by_side["train"] + by_side["test"],
        sum(count for group, count in by_side["test"].items() if group in by_side["train"]),
    )


def kinds(cleaned: Mapping[str, Path], found: Grouped) -> NDArray[np.int64]:
    """[rows, 3] numbers of prompt, chosen and rejected answer; near-duplicates of one prompt share theirs.

    Rows in the order of `rows_of`. Rows alone in their group are not looked into; their answers have number -1.
    """
    answers: dict[tuple[int, bytes], int] = {}
    signatures: list[NDArray[np.uint32]] = []
    within: list[int] = []

    def number(prompt: int, answer: Sequence[Message]) -> int:
        key = (prompt, messages_digest(answer))
        if key not in answers:
            answers[key] = len(answers)
            signatures.append(dedup.signature(text_of(answer)))
            within.append(prompt)
        return answers[key]

    rows = []
    for _, _, row in rows_of(cleaned, ["prompt", "chosen", "rejected", "group"]):
        prompt = found.prompts[prompt_group(row["prompt"])]
        alone = found.rows[found.groups.of(row["group"])] == 1
        rows.append((prompt, *(-1 if alone else number(prompt, row[side]) for side in ("chosen", "rejected"))))
    result = np.array(rows, dtype=np.int64).reshape(len(rows), 3)
    if signatures:
        labels = np.r_[dedup.clusters(np.stack(signatures), np.array(within)), -1]  # -1 stays -1
        result[:, 1:] = labels[result[:, 1:]]
    return result


def rows_of(cleaned: Mapping[str, Path], columns: list[str] | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(side, source, row) of all sources, the train rows first."""
    for side in SIDES:
        for name, folder in cleaned.items():
            for row in iter_rows(folder / f"{side}.arrow", columns):
                yield side, name, row


def text_of(messages: Sequence[Message]) -> str:
    """The contents of messages as one text."""
    return "\n".join(turn["content"] for turn in messages)
