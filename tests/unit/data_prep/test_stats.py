from pathlib import Path
from typing import Any

import pytest

from data_prep.stats import phase_table, preference_table, token_lengths, token_table
from data_prep.tables import PAIR_SCHEMA, write_table
from data_prep.tokenise import SCHEMAS


def pair(source: str, chosen: str, rejected: str, group: str = "g") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": source,
        "group": group,
        "weight": 1.0,
    }


def test_rows_by_phase_and_side(tmp_path: Path) -> None:
    write_table([pair("a", "x", "y")] * 2 + [pair("b", "x", "y")], tmp_path / "sft-train.arrow", PAIR_SCHEMA)
    write_table([pair("b", "x", "y")], tmp_path / "ppo-eval.arrow", PAIR_SCHEMA)
    table = phase_table(tmp_path)
    assert table.to_dict() == {
        "sft-train": {"a": 2, "b": 1, "total": 3},
        "ppo-eval": {"a": 0, "b": 1, "total": 1},
    }


def test_preferences_by_source(tmp_path: Path) -> None:
    rows = [pair("a", "long", "x"), pair("a", "long", "y"), pair("a", "z", "long", "h"), pair("b", "p", "q")]
    write_table(rows, tmp_path / "t.arrow", PAIR_SCHEMA)
    table = preference_table(tmp_path / "t.arrow")
    assert table.loc["a", "longer_chosen"] == pytest.approx(2 / 3)
    assert table.loc["total", "longer_chosen"] == pytest.approx(2 / 3)  # the pair of equal lengths says nothing
    assert table.loc["total", "pairs"] == 4
    assert table["pairs_per_prompt"].to_dict() == {"a": 1.5, "b": 1.0, "total": 2.0}  # one prompt is in both sources
    assert table.loc["a", "chosen_chars"] == pytest.approx(3.0)


def test_lengths_and_their_percentiles(tmp_path: Path) -> None:
    sft = [{"prompt": [0] * p, "answer": [0] * a, "source": s} for p, a, s in ((4, 6, "a"), (2, 2, "b"), (6, 2, "a"))]
    write_table(sft, tmp_path / "sft-train.arrow", SCHEMAS["sft"])
    pairs = [{"prompt": [0] * 3, "chosen": [0] * 5, "rejected": [0], "weight": 1.0, "source": "a"}]
    write_table(pairs, tmp_path / "reward-train.arrow", SCHEMAS["reward"])
    table = token_table(token_lengths(tmp_path))
    assert table.loc[("sft", "sequence", "a"), ["rows", "mean", "p50", "max", "total"]].tolist() == [2, 9, 9, 10, 18]
    assert table.loc[("sft", "sequence", "total"), ["rows", "p50", "total"]].tolist() == [3, 8, 22]
    assert table.loc[("sft", "answer", "b"), "max"] == 2
    assert table.loc[("reward", "pair", "a"), "total"] == 3 + 5 + 3 + 1  # the prompt is read with either answer
    assert [key[2] for key in table.index][:3] == ["a", "b", "total"]
