"""What belongs together across all sources: rows with one prompt, one post, or prompts that are almost the same.

A group is split as a whole, so what is not found here can leak from train to test.  SFT learns every answer of an
SFT-only conversation, so the prompts of them all (`keys.inner_groups`; not what is near them) are of its group:
conversations that begin alike are one group, with the pairs of a prompt that is such a beginning.  Where many begin
with the same turn ("Hi"), their group is on one side and in one phase however large it is; and if a set holds that
prompt out, or a pair puts it into another phase, SFT learns none of them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep import dedup
from data_prep.conversation import Message
from data_prep.keys import inner_groups, messages_digest, prompt_group, signs
from data_prep.spread import Mapper
from data_prep.tables import iter_rows

SIDES = ("train", "test")
SHARD_TEXTS = 1000


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


def grouped(cleaned: Mapping[str, Path], mapped: Mapper = map) -> Grouped:
    """Group the rows of the cleaned folders {source: folder with train.arrow and test.arrow}.

    mapped: `map`, or another that makes the signatures of many texts elsewhere.
    """
    groups = Groups()
    names: dict[str, int] = {}

    def new_prompts() -> Iterator[str]:
        for _, _, row in rows_of(cleaned, ["prompt", "rejected", "group"]):
            name = prompt_group(row["prompt"])
            for joined in (name, *([] if row["rejected"] else inner_groups(row["prompt"]))):
                groups.join(row["group"], joined)
            if name not in names:
                names[name] = len(names)
                yield text_of(row["prompt"])

    labels = dedup.clusters(signatures(new_prompts(), mapped))
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


def kinds(cleaned: Mapping[str, Path], found: Grouped, mapped: Mapper = map) -> NDArray[np.int64]:
    """[rows, 3] numbers of prompt, chosen and rejected answer; near-duplicates of one prompt share theirs.

    Prompts of one group whose `signs` differ ("What is 7 + 2?", "What is 7 - 2?") are different prompts here.  Rows in
    the order of `rows_of`. Rows alone in their group are not looked into; their numbers are -1.
    """
    prompts: dict[tuple[int, str], int] = {}
    answers: dict[tuple[int, bytes], int] = {}
    within: list[int] = []
    rows = []

    def new_answers() -> Iterator[str]:
        for _, _, row in rows_of(cleaned, ["prompt", "chosen", "rejected", "group"]):
            numbers = [-1, -1, -1]
            if found.rows[found.groups.of(row["group"])] > 1:
                exact = (found.prompts[prompt_group(row["prompt"])], signs(text_of(row["prompt"])))
                prompt = numbers[0] = prompts.setdefault(exact, len(prompts))
                for place, side in ((1, "chosen"), (2, "rejected")):
                    key = (prompt, messages_digest(row[side]))
                    numbers[place] = answers.setdefault(key, len(answers))
                    if len(answers) > len(within):
                        within.append(prompt)
                        yield text_of(row[side])
            rows.append(numbers)

    made = signatures(new_answers(), mapped)
    result = np.array(rows, dtype=np.int64).reshape(len(rows), 3)
    labels = np.r_[dedup.clusters(made, np.array(within, dtype=np.int64)), -1]  # -1 stays -1
    result[:, 1:] = labels[result[:, 1:]]
    return result


def signatures(texts: Iterable[str], mapped: Mapper = map) -> dedup.Signatures:
    """[N, PERMUTATIONS] of the texts, by shards."""
    return np.concatenate([dedup.signatures_of([]), *mapped(dedup.signatures_of, _shards(texts))])


def _shards(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while shard := list(islice(texts, SHARD_TEXTS)):
        yield shard


def rows_of(cleaned: Mapping[str, Path], columns: list[str] | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(side, source, row) of all sources, the train rows first."""
    for side in SIDES:
        for name, folder in cleaned.items():
            for row in iter_rows(folder / f"{side}.arrow", columns):
                yield side, name, row


def text_of(messages: Sequence[Message]) -> str:
    """The contents of messages as one text."""
    return "\n".join(turn["content"] for turn in messages)
