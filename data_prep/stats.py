"""The counts of data preparation as tables that people read."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.splits import PHASES, SIDES
from data_prep.tables import iter_rows, read_arrow

PERCENTILES = (50, 90, 99)


def phase_table(folder: Path) -> pd.DataFrame:
    """Rows of a folder of {phase}-{side}.arrow tables (split or tokenised): a line a source, a column a file."""
    counts = {
        f"{phase}-{side}": pd.Series(
            [row["source"] for row in iter_rows(folder / f"{phase}-{side}.arrow", ["source"])], dtype="str"
        ).value_counts()
        for phase in PHASES
        for side in SIDES
        if (folder / f"{phase}-{side}.arrow").is_file()
    }
    table = pd.DataFrame(counts).fillna(0).astype(int).sort_index()
    table.loc["total"] = table.sum()
    return table


def preference_table(path: Path) -> pd.DataFrame:
    """What a reward model meets, by source: pairs that share a prompt, and the length bias that it has to beat.

    path: a table of pairs (`tables.PAIR_SCHEMA`).  Columns: pairs, pairs_per_prompt (mean over the blended
    groups, where prompts that are nearly equal are one), longer_chosen (share of the pairs whose answers differ in
    length), chosen_chars and rejected_chars (means).
    """
    table = read_arrow(path, ["source", "group", "chosen", "rejected"])
    lengths = pd.DataFrame(
        {
            "source": table["source"].to_pylist(),
            "group": table["group"].to_pylist(),
            "chosen": _characters(table["chosen"]),
            "rejected": _characters(table["rejected"]),
        }
    )
    lengths["differ"] = lengths["chosen"] != lengths["rejected"]
    lengths["longer"] = lengths["chosen"] > lengths["rejected"]
    by_source = pd.concat([lengths, lengths.assign(source="total")]).groupby("source", sort=False)
    return pd.DataFrame(
        {
            "pairs": by_source.size(),
            "pairs_per_prompt": by_source.size() / by_source["group"].nunique(),
            "longer_chosen": by_source["longer"].sum() / by_source["differ"].sum(),
            "chosen_chars": by_source["chosen"].mean(),
            "rejected_chars": by_source["rejected"].mean(),
        }
    )


def _characters(answers: pa.ChunkedArray) -> np.ndarray:
    """Characters of each answer's first message."""
    return pc.utf8_length(pc.struct_field(pc.list_element(answers, 0), "content")).to_numpy()


def token_lengths(folder: Path) -> pd.DataFrame:
    """Lengths of the tokenised train rows, in tokens: a line a row, phase and part.

    Columns: phase, source, part, tokens.  A part is a column of ids (prompt, answer, chosen, rejected), or what a row
    costs in training where it has several: "sequence" is prompt and answer, "pair" both sequences of a pair.
    """
    tables = []
    for phase in PHASES:
        path = folder / f"{phase}-train.arrow"
        if path.is_file():
            tables.append(_lengths(read_arrow(path)).assign(phase=phase))
    return pd.concat(tables, ignore_index=True)[["phase", "source", "part", "tokens"]]


def _lengths(table: pa.Table) -> pd.DataFrame:
    columns = {
        field.name: pc.list_value_length(table[field.name]).to_numpy()
        for field in table.schema
        if pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type)
    }
    if len(columns) == 2:
        columns["sequence"] = np.sum(list(columns.values()), axis=0)
    elif len(columns) == 3:
        columns["pair"] = np.sum(list(columns.values()), axis=0) + columns["prompt"]  # the prompt stands in both
    lines = pd.DataFrame(columns).assign(source=table["source"].to_pylist())
    return lines.melt(id_vars="source", var_name="part", value_name="tokens")


def token_table(lengths: pd.DataFrame) -> pd.DataFrame:
    """Percentiles of `token_lengths` by (phase, part, source), with a line for all sources together.

    Columns: rows, mean, p50, p90, p99, max, total.
    """
    names = [*sorted(lengths["source"].unique()), "total"]
    whole = pd.concat([lengths, lengths.assign(source="total")])
    for column, order in (("phase", lengths["phase"].unique()), ("part", lengths["part"].unique()), ("source", names)):
        whole[column] = pd.Categorical(whole[column], order)  # grouped in this order, not by letters
    tokens = whole.groupby(["phase", "part", "source"], observed=True)["tokens"]
    columns = {"rows": tokens.size(), "mean": tokens.mean()}
    columns |= {f"p{p}": tokens.quantile(p / 100) for p in PERCENTILES}
    return pd.DataFrame(columns | {"max": tokens.max(), "total": tokens.sum()})
