from pathlib import Path
from typing import Any

import pytest

from data_prep.stats import drop_table, length_bias_table, phase_table
from data_prep.tables import PAIR_SCHEMA, write_table


def pair(source: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": source,
        "group": "g",
        "weight": 1.0,
    }


def test_drops_by_source() -> None:
    table = drop_table(
        {
            "a": {"rows_in": 5, "kept": 3, "drops": {"tie": 2}},
            "b": {"rows_in": 4, "kept": 2, "drops": {"empty": 1, "tie": 1}},
        }
    )
    assert list(table.columns) == ["rows in", "kept", "empty", "tie"]
    assert table.loc["a"].tolist() == [5, 3, 0, 2]
    assert table.loc["total"].tolist() == [9, 5, 1, 3]


def test_rows_by_phase_and_side(tmp_path: Path) -> None:
    write_table([pair("a", "x", "y")] * 2 + [pair("b", "x", "y")], tmp_path / "sft-train.arrow", PAIR_SCHEMA)
    write_table([pair("b", "x", "y")], tmp_path / "ppo-eval.arrow", PAIR_SCHEMA)
    table = phase_table(tmp_path)
    assert table.to_dict() == {
        "sft-train": {"a": 2, "b": 1, "total": 3},
        "ppo-eval": {"a": 0, "b": 1, "total": 1},
    }


def test_length_bias(tmp_path: Path) -> None:
    rows = [pair("a", "long", "x"), pair("a", "long", "y"), pair("a", "z", "long"), pair("b", "p", "q")]
    write_table(rows, tmp_path / "t.arrow", PAIR_SCHEMA)
    table = length_bias_table(tmp_path / "t.arrow")
    assert table.loc["a", "longer_chosen"] == pytest.approx(2 / 3)
    assert table.loc["total", "longer_chosen"] == pytest.approx(2 / 3)  # the pair of equal lengths says nothing
    assert table.loc["total", "pairs"] == 4
    assert table.loc["a", "chosen_chars"] == pytest.approx(3.0)
