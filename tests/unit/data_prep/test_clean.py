from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.clean import clean
from data_prep.sources import SourceSpec
from data_prep.tables import read_table

Row = dict[str, Any]
Clean = Callable[..., tuple[dict[str, Any], list[Row], list[Row]]]


@pytest.fixture
def cleaned(tmp_path: Path) -> Clean:
    """Runs `clean` over rows by split; returns the metrics and the rows of both sides."""

    def run(spec: SourceSpec, splits: dict[str, list[Row]], **options: Any) -> Any:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        raw = out / "raw"
        for split, rows in splits.items():
            (raw / split).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), raw / split / "0000.parquet")
        metrics = clean(spec, raw, out, **options)
        for side in ("train", "test", "total"):
            assert metrics[side]["rows_in"] == metrics[side]["kept"] + sum(metrics[side]["drops"].values())
        assert sorted(file.name for file in out.iterdir()) == ["raw", "test.arrow", "train.arrow"]
        return metrics, *(read_table(out / f"{side}.arrow").to_list() for side in ("train", "test"))

    return run


def texts(row: Row) -> tuple[list[str], str, str]:
    return [turn["content"] for turn in row["prompt"]], row["chosen"][0]["content"], row["rejected"][0]["content"]


def dialogue(prompt: str, chosen: str, rejected: str) -> Row:
    return {"prompt": f"\n\nHuman: {prompt}\n\nAssistant:", "chosen": chosen, "rejected": rejected}


HH = SourceSpec("Dahoas/full-hh-rlhf")
GOOD = dialogue("Why?", " Because.", " No.")


def test_a_dialogue_row(cleaned: Clean) -> None:
    metrics, train, test = cleaned(HH, {"train": [GOOD], "test": [dialogue("How?", " So.", " No.")]})
    assert train == [
        {
            "prompt": [{"role": "user", "content": "Why?"}],
            "chosen": [{"role": "assistant", "content": "Because."}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "source": "Dahoas/full-hh-rlhf",
            "group": train[0]["group"],
            "weight": 1.0,
        }
    ]
    assert [texts(row) for row in test] == [(["How?"], "So.", "No.")]
    assert metrics["total"] == {"rows_in": 2, "kept": 2, "drops": {}, "fixes": {}}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (dialogue("Why?", " \n", " No."), "empty"),
        (dialogue("Why?", " Yes.", None), "empty"),  # type: ignore[arg-type]
        (dialogue(" ", " Yes.", " No."), "empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty"),
        (dialogue("Why?", " No.", "No. "), "identical"),
        (dialogue("Why?", " Yes\ufffd.", " No."), "broken_characters"),
        (dialogue("Why?", " Yes.\n\nHuman: Really?\n\nAssistant: Yes.", " No."), "role_order"),
        (dialogue("Why?\n\nHuman: Well?", " Yes.", " No."), "role_order"),
        (dialogue("Why?\n\nAssistant: A moment.", " Yes.", " No."), "role_order"),
        # What a cut at the last "Assistant:" leaves behind, a begun answer in the prompt.
        ({"prompt": "\n\nHuman: Why?\n\nAssistant: Assistant:", "chosen": " a", "rejected": " b"}, "role_order"),
        ({"prompt": "and so on\n\nHuman: Why?\n\nAssistant:", "chosen": " a", "rejected": " b"}, "role_order"),
        (dialogue("Why?", " " + "so " * 40, " No."), "too_long"),
        (GOOD, "duplicate"),
    ],
)
def test_drops(cleaned: Clean, row: Row, reason: str) -> None:
    metrics, train, _ = cleaned(HH, {"train": [GOOD, row]}, max_chars=100)
    assert metrics["train"]["drops"] == {reason: 1}
    assert [texts(row) for row in train] == [(["Why?"], "Because.", "No.")]


def test_the_word_assistant_inside_an_answer_is_text(cleaned: Clean) -> None:
    row = dialogue("Who are you?", ' I sign as "Assistant: AI".\nHuman: is you.', " The word Assistant: means helper.")
    _, train, _ = cleaned(HH, {"train": [row]})
    assert texts(train[0])[1:] == (row["chosen"].strip(), row["rejected"].strip())


def test_fixes_are_made_and_counted(cleaned: Clean) -> None:
    rows = [
        dialogue("Why not?\r\n\r\nAssistant: Hm.\r\n\r\nHuman\r\n\r\nHuman: So?", " Cafe\u0301.\n\nHuman", " No."),
        dialogue("Where?", " Human: Here.", " There &amp; here [1]."),
    ]
    metrics, train, _ = cleaned(HH, {"train": rows})
    # The stray "Human" paragraph ends the assistant's turn, where it is taken away.
    assert texts(train[0]) == (["Why not?", "Hm.", "So?"], "Café.", "No.")
    assert texts(train[1]) == (["Where?"], "Here.", "There &amp; here [1].")
    assert metrics["train"]["fixes"] == {"leading_marker": 1, "line_ends": 1, "nfc": 1, "stray_marker": 1}


def test_a_pair_that_is_preferred_both_ways_says_nothing(cleaned: Clean) -> None:
    other = dialogue("Why?", " No.", " Because.")
    metrics, train, _ = cleaned(HH, {"train": [GOOD, other, other, dialogue("How?", " Because.", " No.")]})
    assert metrics["train"]["drops"] == {"contradicted": 2, "duplicate": 1}
    assert [texts(row)[0] for row in train] == [["How?"]]


def test_the_reward_set_names_the_speaker_in_its_answers(cleaned: Clean) -> None:
    row = {"prompt": "\n\nHuman: Why?\n\n", "chosen": "Assistant: Because.", "rejected": "Assistant: No Assistant: x"}
    _, train, _ = cleaned(SourceSpec("yitingxie/rlhf-reward-datasets"), {"train": [row]})
    assert texts(train[0]) == (["Why?"], "Because.", "No Assistant: x")
    _, same, _ = cleaned(HH, {"train": [dialogue("Why?", " Because.", " No Assistant: x")]})
    assert same[0]["group"] == train[0]["group"]


def test_an_instruction_is_one_message_whatever_it_holds(cleaned: Clean) -> None:
    prompt = "Human: is a word.\n\nAssistant: is another. Q:"
    row = {"prompt": prompt, "chosen": "a &amp; b", "rejected": "c"}
    _, train, test = cleaned(SourceSpec("Dahoas/synthetic-instruct-gptj-pairwise"), {"train": [row]})
    assert texts(train[0]) == ([prompt], "a &amp; b", "c")
    assert test == []


def webgpt(first: str, second: str, score: float) -> Row:
    return {
        "question": {"dataset": "d", "id": "1", "full_text": "What is R&amp;D?"},
        "quotes_0": {"title": ["t"], "extract": ["e"]},
        "answer_0": first,
        "score_0": score,
        "answer_1": second,
        "score_1": -score,
    }


def test_webgpt(cleaned: Clean) -> None:
    rows = [
        webgpt("Best [1]. So (really) [sic].", "Worse [2, 3].", 0.5),
        webgpt("Bad.", "Good.", -1.0),
        webgpt("One.", "Two.", 0.0),
        webgpt("Same [1].", "Same [2].", 1.0),
    ]
    metrics, train, _ = cleaned(SourceSpec("openai/webgpt_comparisons"), {"train": rows})
    assert [texts(row)[1:] for row in train] == [("Best. So (really) [sic].", "Worse."), ("Good.", "Bad.")]
    assert texts(train[0])[0] == ["What is R&D?"]
    assert metrics["train"]["drops"] == {"identical": 1, "tie": 1}
    assert metrics["train"]["fixes"] == {"citations": 1, "html_entities": 2}


def shp(post: str, first: str, second: str, label: int, ratio: float = 3.0) -> Row:
    return {
        "post_id": post,
        "domain": "ask_train",
        "history": f"Title of {post}",
        "human_ref_A": first,
        "human_ref_B": second,
        "labels": label,
        "score_ratio": ratio,
    }


def test_shp(cleaned: Clean) -> None:
    rows = [
        shp("p1", "A &gt; B", "worse", 1),
        shp("p1", "worse", "better", 0),
        shp("p1", "unclear", "other", 1, ratio=1.9),
        shp("p1", "third", "worse", 1),
        shp("p2", "just", "enough", 1, ratio=2.0),
    ]
    splits = {"train": rows, "validation": [shp("p3", "x", "y", 1)], "test": [shp("p4", "x", "y", 0)]}
    metrics, train, test = cleaned(SourceSpec("stanfordnlp/SHP", max_pairs_per_prompt=2), splits)
    assert [texts(row)[1:] for row in train] == [
        ("A > B", "worse"),
        ("better", "worse"),
        ("just", "enough"),
        ("x", "y"),
    ]
    assert [texts(row)[1:] for row in test] == [("y", "x")]
    assert metrics["train"]["drops"] == {"low_score_ratio": 1, "too_many_pairs": 1}
    assert [row["group"] for row in train] == [f"stanfordnlp/SHP:{post}" for post in ("p1", "p1", "p2", "p3")]
    loose = SourceSpec("stanfordnlp/SHP", min_score_ratio=1.0)
    assert cleaned(loose, splits)[0]["train"]["drops"] == {}


def test_pairs_of_one_prompt_are_capped_where_a_source_says_so(cleaned: Clean) -> None:
    """Of the prompt as it is grouped, so whatever its case; the first ones stay, on either side."""
    rows = [dialogue("How?", " Yes.", " No."), dialogue("HOW?", " Yes.", " Never."), dialogue("Why?", " So.", " No.")]
    one = SourceSpec("Dahoas/rm-static", max_pairs_per_prompt=1)
    metrics, train, test = cleaned(one, {"train": rows, "test": rows[::-1]})
    assert [texts(row)[1:] for row in train] == [("Yes.", "No."), ("So.", "No.")]
    assert [texts(row)[1:] for row in test] == [("So.", "No."), ("Yes.", "Never.")]
    assert metrics["train"]["drops"] == metrics["test"]["drops"] == {"too_many_pairs": 1}


def test_a_contradiction_shows_before_the_cap_and_takes_no_place(cleaned: Clean) -> None:
    rows = [dialogue("How?", *answers) for answers in ((" Yes.", " No."), (" No.", " Yes."), (" So.", " Never."))]
    one = SourceSpec("Dahoas/rm-static", max_pairs_per_prompt=1)
    metrics, train, _ = cleaned(one, {"train": rows, "test": []})
    assert [texts(row)[1:] for row in train] == [("So.", "Never.")]
    assert metrics["train"]["drops"] == {"contradicted": 2}


@pytest.mark.parametrize(("given", "kept"), [(None, 5), (2, 2), (6, 6)])
def test_shp_alone_has_a_cap_of_its_own(cleaned: Clean, given: int | None, kept: int) -> None:
    posts = [shp("p", f"Good {number}.", f"Bad {number}.", 1) for number in range(7)]
    splits = {"train": posts, "validation": [], "test": posts}
    spec = SourceSpec("stanfordnlp/SHP", max_pairs_per_prompt=given)
    assert cleaned(spec, splits)[0]["train"]["drops"] == {"too_many_pairs": 7 - kept}
    answers = [webgpt(f"Good {number}.", f"Bad {number}.", 1.0) for number in range(7)]
    spec = SourceSpec("openai/webgpt_comparisons", max_pairs_per_prompt=given)
    assert len(cleaned(spec, {"train": answers})[1]) == (given or 7)


def test_the_cap_samples_and_mostly_stays_when_the_set_grows(cleaned: Clean) -> None:
    rows = [dialogue(f"Number {number}?", " Yes.", " No.") for number in range(200)]
    spec = SourceSpec("Dahoas/full-hh-rlhf", max_rows=50)
    metrics, few, test = cleaned(spec, {"train": rows[:150], "test": rows[150:]})
    assert metrics["train"]["drops"] == {"cap": 100}
    assert len(test) == 50
    numbers = [int(texts(row)[0][0][7:-1]) for row in few]
    assert numbers == sorted(numbers)
    assert 55 < sum(numbers) / len(numbers) < 95  # spread over the set, not its first rows
    _, grown, _ = cleaned(spec, {"train": rows})
    assert len({row["group"] for row in few} & {row["group"] for row in grown}) > 25


def test_nothing_left_is_an_error_that_says_why(cleaned: Clean) -> None:
    with pytest.raises(ValueError, match=r"No train row of .*full-hh-rlhf is left .* 2 rows \(identical 2\)"):
        cleaned(HH, {"train": [dialogue("a", " b", " b")] * 2})
