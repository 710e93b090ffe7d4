"""The counts of data preparation as tables that people read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.splits import PHASES, SIDES
from data_prep.tables import iter_rows


def drop_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Rows in, kept and dropped by reason: a line a source (or whatever the keys name) and a line for the total.

    metrics: name -> {"rows_in", "kept", "drops": {reason: count}}, as `clean` (its "total") and `blend` return them.
    """
    lines = {
        name: {"rows in": counts["rows_in"], "kept": counts["kept"], **counts["drops"]}
        for name, counts in metrics.items()
    }
    table = pd.DataFrame.from_dict(lines, orient="index").fillna(0).astype(int)
    reasons = sorted(set(table.columns) - {"rows in", "kept"})
    table = table[["rows in", "kept", *reasons]]
    table.loc["total"] = table.sum()
    return table


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


def length_bias_table(path: Path) -> pd.DataFrame:
    """How often the longer answer is the preferred one, by source: what a reward model has to beat.

    path: a table of pairs (`tables.PAIR_SCHEMA`).  Columns: pairs, longer_chosen (share of the pairs whose answers
    differ in length), chosen_chars and rejected_chars (means).
    """
    lengths = pd.DataFrame(
        [
            (row["source"], len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"]))
            for row in iter_rows(path, ["source", "chosen", "rejected"])
        ],
        columns=["source", "chosen", "rejected"],
    )
    lengths["differ"] = lengths["chosen"] != lengths["rejected"]
    lengths["longer"] = lengths["chosen"] > lengths["rejected"]
    by_source = pd.concat([lengths, lengths.assign(source="total")]).groupby("source", sort=False)
    return pd.DataFrame(
        {
            "pairs": by_source.size(),
            "longer_chosen": by_source["longer"].sum() / by_source["differ"].sum(),
            "chosen_chars": by_source["chosen"].mean(),
            "rejected_chars": by_source["rejected"].mean(),
        }
    )
