"""The figures of an evaluation, worked by hand on four prompts of two sources."""

import pytest

from tasks.compared import comparison, measured


def row(source: str, proxy: tuple[float, float], gold: tuple[float, float] | None = None) -> dict:
    row = {"source": source, "a": "x y", "b": "x y", "a_reward": proxy[0], "b_reward": proxy[1]}
    return row | ({"a_gold": gold[0], "b_gold": gold[1]} if gold else {})


ROWS = [
    row("left", (1.0, 0.0), (1.0, 0.0)),
    row("left", (2.0, 1.0), (0.0, 0.0)),
    row("left", (3.0, 1.0), (-1.0, 1.0)),
    row("right", (0.0, 2.0), (0.0, 3.0)),
]


def test_both_scorers_and_their_gap():
    found = comparison(ROWS, "a", "b")
    assert found["prompts"] == 4
    assert found["win_rate"] == 0.75
    assert found["gold_win_rate"] == 0.375  # a win, a tie, two losses
    assert found["win_rate_gap"] == 0.375
    assert found["win_rate_gap_low"] <= 0.375 <= found["win_rate_gap_high"]
    # Mean gains are (1 + 1 + 2 - 2) / 4 and (1 + 0 - 2 - 3) / 4; the rival's scores 0, 1, 1, 2 and 0, 0, 1, 3.
    assert found["gain"] == pytest.approx(0.5 / 0.5**0.5)
    assert found["gold_gain"] == pytest.approx(-1 / 1.5**0.5)
    assert found["gain_gap"] == pytest.approx(0.5 / 0.5**0.5 + 1 / 1.5**0.5)
    assert found["length_controlled_win_rate"] == pytest.approx(0.75), "all answers are as long"


def test_every_source_has_its_own_rates():
    found = comparison(ROWS, "a", "b")["per_source"]
    assert list(found) == ["left", "right"]
    assert (found["left"]["prompts"], found["left"]["win_rate"], found["left"]["gold_win_rate"]) == (3, 1.0, 0.5)
    assert (found["right"]["prompts"], found["right"]["win_rate"], found["right"]["gold_win_rate"]) == (1, 0.0, 0.0)
    assert (found["left"]["win_rate_gap"], found["right"]["win_rate_gap"]) == (0.5, 0.0)
    assert found["left"]["length_controlled_win_rate"] > 0.5 > found["right"]["length_controlled_win_rate"]
    assert (found["left"]["a_reward"], found["right"]["a_gold"]) == (2.0, 0.0)


def test_without_a_gold_model_there_is_no_gap():
    found = comparison([row("left", (1.0, 0.0)), row("left", (0.0, 1.0))], "a", "b")
    assert found["win_rate"] == 0.5
    assert not [name for name in found if "gold" in name or "gap" in name]


def test_means_are_over_the_answers_and_distinct_over_all_words():
    rows = [
        {"a": "x y", "a_reward": 0.0, "a_tokens": 2, "a_ended": True, "a_repetition": 0.5},
        {"a": "x x", "a_reward": 2.0, "a_tokens": 4, "a_ended": False, "a_repetition": 0.0},
    ]
    assert measured(rows, "a") == {
        "a_reward": 1.0,
        "a_reward_std": 1.0,
        "a_tokens": 3.0,
        "a_eos_rate": 0.5,
        "a_repetition": 0.25,
        "a_distinct_1": 0.5,
        "a_distinct_2": 1.0,
        "a_distinct_3": 0.0,
    }
