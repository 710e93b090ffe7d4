"""Rows as they are trained on: the tokens of the prepared tables as text, cut where the loss mask changes.

What is shown is decoded from the ids in the table, not taken from the text they came from: a template that is applied
twice or an EOS that is missing can be seen here, and nowhere else.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_prep.tables import iter_rows
from data_prep.tokenise import ANSWERS


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of which the same is to be said."""

    text: str
    learnt: bool
    """Whether the loss counts them."""
    special: bool
    """A special token, such as EOS."""


@dataclass(frozen=True)
class Shown:
    """One sequence of a row."""

    source: str
    answer: str | None
    """Which answer of the row it ends in: answer, chosen, rejected; None for a prompt alone."""
    tokens: int
    segments: list[Segment]


def shown(path: Path, phase: str, tokenizer: PreTrainedTokenizerBase, source: str | None, count: int) -> list[Shown]:
    """The sequences of the first `count` rows of a tokenised table, of one source or of any.

    Args:
        source: the whole name of a source, or its last part, in any case of letters.

    Raises ValueError for a source that the table has no row of, with the names that it has.
    """
    wanted = None if source is None else find_source(source, sources(path))
    rows = (row for row in iter_rows(path) if wanted is None or row["source"] == wanted)
    answers: list[str | None] = [*ANSWERS[phase]] or [None]
    found = []
    for row, _ in zip(rows, range(count), strict=False):
        for answer in answers:
            ids, learnt = list(row["prompt"]), [False] * len(row["prompt"])
            if answer is not None:
                ids, learnt = ids + row[answer], learnt + _learnt(row, answer)
            found.append(Shown(row["source"], answer, len(ids), segments(tokenizer, ids, learnt)))
    return found


def _learnt(row: Mapping[str, Any], answer: str) -> list[bool]:
    learnt = [True] * len(row[answer])
    for span in row.get("others") or ():
        learnt[span["begin"] : span["end"]] = [False] * (span["end"] - span["begin"])
    return learnt


def segments(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], learnt: Sequence[bool]) -> list[Segment]:
    """Token ids as text, in runs of one kind; special tokens stand alone, each under its own name."""
    special = set(tokenizer.all_special_ids)
    return [
        Segment(tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False), is_learnt, kind)
        for run, is_learnt, kind in _runs(ids, learnt, special)
    ]


def _runs(ids: Sequence[int], learnt: Sequence[bool], special: set[int]) -> Iterator[tuple[list[int], bool, bool]]:
    run: list[int] = []
    before: tuple[bool, bool] | None = None
    for token, is_learnt in zip(ids, learnt, strict=True):
        kind = (is_learnt, token in special)
        if run and (kind != before or kind[1]):
            assert before is not None
            yield run, *before
            run = []
        run.append(token)
        before = kind
    if run:
        assert before is not None
        yield run, *before


def sources(path: Path) -> list[str]:
    """The names of the sources that a table has rows of, sorted."""
    return sorted({row["source"] for row in iter_rows(path, ["source"])})


def find_source(wanted: str, names: Sequence[str]) -> str:
    """The source that a user means. Raises ValueError with near names."""
    low = wanted.lower()
    found = [name for name in names if name.lower() == low] or [
        name for name in names if name.lower().rpartition("/")[2] == low
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"several sources are called {wanted}: {', '.join(found)}; give the whole name")
    short = {name.lower().rpartition("/")[2]: name for name in names} | {name.lower(): name for name in names}
    near = difflib.get_close_matches(low, short, n=1, cutoff=0.3)
    hint = f"did you mean {short[near[0]]}? They are" if near else "they are"
    raise ValueError(
        f"no row here is from a source {wanted}; {hint}: {', '.join(names)}. Another phase may have some (--phase)"
    )
