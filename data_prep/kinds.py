"""What a set's rows are: pairs, SFT-only conversations or ranked answers; all become rows of one form.

    pairs   prompt, chosen, rejected
    sft     messages, the last one the assistant's: every assistant's turn is learnt, nothing is compared
    ranked  prompt, responses, scores: all pairs of one prompt's answers, as InstructGPT collects 4 to 9 of them

The pairs of k ranked answers weigh 1 / C(k, 2) each, so that a prompt counts once however many answers it has (Ouyang
et al. 2022, section 3.5, equation 1).  Answers of equal score are no preference; such a pair is marked as a tie.
"""

from collections.abc import Iterable, Iterator
from itertools import combinations
from math import comb, isfinite
from typing import Any, Literal, get_args

import pyarrow as pa

from data_prep.local_files import check_cells, list_of

Kind = Literal["pairs", "sft", "ranked"]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("prompt", "chosen", "rejected"),
    "sft": ("messages",),
    "ranked": ("prompt", "responses", "scores"),
}
UNIFIED = ("kind", "prompt", "chosen", "rejected", "tie", "weight")
"""The columns of every set after `unified`; those of an SFT-only set have the whole conversation as their prompt."""


def check_columns(name: str, found: Iterable[str], needed: Iterable[str]) -> None:
    """ValueError that says which of the needed columns are missing and which were found."""
    found = list(found)
    missing = [column for column in needed if column not in found]
    if missing:
        raise ValueError(
            f"The set {name} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            f"found were {', '.join(found) or 'none'}. Rename its columns, or name another set."
        )


def kind_of(name: str, columns: Iterable[str]) -> Kind:
    """The kind that a set's columns speak of.  ValueError where they speak of several, or of none."""
    found = set(columns)
    kinds = [kind for kind in get_args(Kind) if found.issuperset(COLUMNS[kind])]
    if len(kinds) > 1:
        raise ValueError(f"The columns of {name} can be read as {' and as '.join(kinds)}: set its kind to one of them.")
    if not kinds:
        check_columns(name, columns, COLUMNS["ranked" if found & {"responses", "scores"} else "pairs"])
    return kinds[0]


def unified(name: str, table: pa.Table, kind: Kind | None) -> pa.Table:
    """A set's rows in the columns `UNIFIED`.

    kind: None to tell it by the columns.  ValueError for missing columns and for cells that are not what they should.
    """
    kind = kind or kind_of(name, table.column_names)
    check_columns(name, table.column_names, COLUMNS[kind])
    if kind == "ranked":
        check_cells(name, table, ("prompt",))
        rows = [pair for row in table.select(COLUMNS[kind]).to_pylist() for pair in ranked_pairs(name, row)]
        return pa.Table.from_pylist(rows, schema=None if rows else pa.schema([(c, pa.null()) for c in UNIFIED]))
    check_cells(name, table, COLUMNS[kind])
    nothing = pa.nulls(table.num_rows)
    columns = list(table.select(COLUMNS[kind]).columns) + ([nothing, nothing] if kind == "sft" else [])
    constant = [
        pa.array([value] * table.num_rows, kind_) for value, kind_ in ((False, pa.bool_()), (1.0, pa.float32()))
    ]
    return pa.table([pa.array([kind] * table.num_rows, pa.string()), *columns, *constant], names=list(UNIFIED))


def ranked_pairs(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pairs of one prompt's answers, each with its better answer first.  ValueError where there is no ranking."""
    try:
        responses, scores = list_of(row["responses"]), [float(score) for score in list_of(row["scores"])]
    except (ValueError, TypeError) as error:
        raise ValueError(f"The set {name} holds responses or scores that are no lists: {error}.") from error
    if len(responses) != len(scores) or len(responses) < 2:
        raise ValueError(
            f"The set {name} holds a row of {len(responses)} responses with {len(scores)} scores; it takes two or more "
            "responses and a score for each."
        )
    if not all(map(isfinite, scores)):
        raise ValueError(
            f"The set {name} holds a row with the scores {scores}: every score has to be a finite number, so leave out "
            "a response that has none."
        )
    weight = 1 / comb(len(responses), 2)
    for (first, high), (second, low) in combinations(zip(responses, scores, strict=True), 2):
        chosen, rejected = (first, second) if high >= low else (second, first)
        yield {
            "kind": "ranked",
            "prompt": row["prompt"],
            "chosen": chosen,
            "rejected": rejected,
            "tie": high == low,
            "weight": weight,
        }
