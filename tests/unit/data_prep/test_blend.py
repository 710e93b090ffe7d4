from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.blend import blend
from data_prep.groups import Groups
from data_prep.keys import prompt_group
from data_prep.tables import PAIR_SCHEMA, read_table, write_table

Row = dict[str, Any]
Folder = Callable[[str], Path]


def pair(prompt: str, chosen: str = "yes", rejected: str = "no", group: str | None = None, source: str = "a") -> Row:
    messages = [{"role": "user", "content": prompt}]
    return {
        "prompt": messages,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": source,
        "group": group or prompt_group(messages),
        "weight": 1.0,
    }


@pytest.fixture
def sources(folder: Folder) -> Callable[..., dict[str, Path]]:
    def write(**rows: tuple[list[Row], list[Row]]) -> dict[str, Path]:
        folders = {}
        for name, sides in rows.items():
            folders[name] = folder(name)
            for side, side_rows in zip(("train", "test"), sides, strict=True):
                named = [{**row, "source": name} for row in side_rows]
                write_table(named, folders[name] / f"{side}.arrow", PAIR_SCHEMA)
        return folders

    return write


def talk(*turns: str) -> Row:
    """A conversation for SFT alone, of a user's and an assistant's turns."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    group = prompt_group(messages[:-1])
    return {**pair("", group=group), "prompt": messages[:-1], "chosen": messages[-1:], "rejected": []}


def rows_of(out: Path, side: str = "train") -> list[Row]:
    return list(read_table(out / f"{side}.arrow").to_list())


def prompts(rows: list[Row]) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows]


def test_copies_and_leaks_between_sources_go(folder: Folder, sources: Any) -> None:
    cleaned = sources(
        a=([pair("one"), pair("two")], [pair("held out")]),
        b=([pair("One!", "other"), pair("two"), pair("Held  out?", "maybe")], [pair("held out"), pair("three")]),
        c=([pair("three", "other answer"), pair("four")], []),
    )
    metrics = blend(cleaned, {}, 0, folder("out"))
    out = folder("again").parent / "out"
    assert prompts(rows_of(out)) == ["one", "two", "One!", "four"]
    assert [row["source"] for row in rows_of(out)] == ["a", "a", "b", "c"]
    assert prompts(rows_of(out, "test")) == ["held out", "three"]
    assert metrics["sources"]["b"]["train"] == {"rows_in": 3, "kept": 1, "drops": {"duplicate": 1, "leak": 1}}
    assert metrics["sources"]["b"]["test"] == {"rows_in": 2, "kept": 1, "drops": {"duplicate": 1}}
    assert metrics["sources"]["c"]["train"]["drops"] == {"leak": 1}
    assert (metrics["train"], metrics["test"], metrics["leak"]) == (4, 2, 2)
    groups = {row["prompt"][0]["content"]: row["group"] for row in rows_of(out)}
    assert groups["one"] == groups["One!"]
    assert metrics["groups"] == 5


def test_a_post_and_a_prompt_join_through_a_row(folder: Folder, sources: Any) -> None:
    """The post's second title leads from one source's prompt to another's, which is held out."""
    cleaned = sources(
        posts=([pair("first title", group="posts:1"), pair("second title", group="posts:1")], []),
        a=([pair("First title", "a")], []),
        b=([], [pair("SECOND title", "b")]),
    )
    cleaned["d"] = sources(d=([pair("free")], []))["d"]
    metrics = blend(cleaned, {}, 0, folder("out"))
    assert metrics["leak"] == 3
    assert metrics["train"] == 1


def test_groups_bear_the_smallest_name_in_whatever_order_they_join() -> None:
    edges = [("c", "d"), ("a", "b"), ("d", "b"), ("x", "y")]
    for order in (edges, edges[::-1]):
        groups = Groups()
        for edge in order:
            groups.join(*edge)
        assert "".join(groups.of(name) for name in "abcdxyz") == "aaaaxxz"


def test_a_weight_below_one_takes_whole_groups_and_the_same_ones_when_rows_arrive(folder: Folder, sources: Any) -> None:
    def kept(name: str, count: int, weight: float, seed: int = 0) -> set[str]:
        rows = [pair(f"number {number}", answer) for number in range(count) for answer in ("x", "y")]
        cleaned = sources(**{name: (rows, [pair("held out")])})
        out = folder(f"{name}-out")
        blend(cleaned, {name: weight}, seed, out)
        assert len(rows_of(out, "test")) == 1
        written = prompts(rows_of(out))
        assert all(written.count(prompt) == 2 for prompt in written)
        return set(written)

    half = kept("half", 400, 0.5)
    assert 150 < len(half) < 250
    assert half <= kept("grown", 500, 0.5)
    assert half <= kept("more", 400, 0.7)
    assert half != kept("seed", 400, 0.5, seed=1)


def test_a_weight_above_one_counts_in_the_loss(folder: Folder, sources: Any) -> None:
    cleaned = sources(a=([pair("one")], []), b=([pair("two")], []))
    blend(cleaned, {"b": 2.5}, 0, folder("out"))
    out = cleaned["a"].parent / "out"
    assert [row["weight"] for row in rows_of(out)] == [1.0, 2.5]


def test_bad_weights_and_nothing_left(folder: Folder, sources: Any) -> None:
    cleaned = sources(a=([pair("one")], [pair("one", "x")]))
    with pytest.raises(ValueError, match="weight for b, which is no source: known are a"):
        blend(cleaned, {"b": 1.0}, 0, folder("1"))
    for number, weight in enumerate((0.0, -1.0, float("nan"), float("inf"))):
        with pytest.raises(ValueError, match="weight of a is"):
            blend(cleaned, {"a": weight}, 0, folder(f"w{number}"))
    with pytest.raises(ValueError, match="No train row is left after blending a"):
        blend(cleaned, {}, 0, folder("2"))


LONG = (
    "Please tell me in a few words how the tides of the sea come about, why there are two of them in a day, not one, "
    "and why they are so much higher at full moon and at new moon than in the weeks that lie between these two"
)
ANSWER = (
    "The moon draws the water on the side that faces it, and the far side lags behind, so two bulges go round us "
    "once a day; when sun and moon stand in one line with us their pulls add up, and at half moon they work crosswise"
)


def test_near_duplicates_and_near_contradictions_go(folder: Folder, sources: Any) -> None:
    nearly = LONG.replace("so much higher", "higher")
    like = ANSWER.replace("add up", "combine")
    cleaned = sources(
        a=([pair(LONG, ANSWER), pair("another one", ANSWER, "the sun")], []),
        b=([pair(nearly, like), pair(LONG, ANSWER, "the wind does it"), pair("another one", "The sun!", like)], []),
    )
    metrics = blend(cleaned, {}, 0, folder("out"))
    out = folder("again").parent / "out"
    assert [(row["source"], row["rejected"][0]["content"]) for row in rows_of(out)] == [
        ("a", "no"),
        ("b", "the wind does it"),
    ]
    assert metrics["sources"]["a"]["train"]["drops"] == {"contradicted": 1}
    assert metrics["sources"]["b"]["train"]["drops"] == {"contradicted": 1, "near_duplicate": 1}
    assert metrics["groups"] == 1


def test_prompts_that_differ_in_their_signs_are_one_group_but_no_copies(folder: Folder, sources: Any) -> None:
    rows = [pair("What is 7 + 2?", "9", "5"), pair("What is 7 - 2?", "5", "9")]
    rows += [pair("What is C?", "x", "y"), pair("What is C++?", "x", "y")]
    again = [pair("what is 7 - 2 ...", "5!", "9"), pair("“What is C”", "x.", "y")]
    metrics = blend(sources(a=(rows, []), b=(again, [])), {}, 0, folder("out"))
    assert prompts(rows_of(folder("again").parent / "out")) == prompts(rows)
    assert metrics["sources"]["b"]["train"]["drops"] == {"near_duplicate": 2}
    assert metrics["groups"] == 2


def test_a_train_prompt_nearly_that_of_a_test_row_leaks(folder: Folder, sources: Any) -> None:
    nearly = LONG.replace("in a few words ", "")
    cleaned = sources(a=([pair(nearly, "x"), pair("free")], []), b=([], [pair(LONG), pair("its own")]))
    metrics = blend(cleaned, {}, 0, folder("out"))
    assert metrics["sources"]["a"]["train"]["drops"] == {"leak": 1}
    assert metrics["leaked_tests"] == 1


def test_a_conversation_belongs_to_every_prompt_that_it_answers(folder: Folder, sources: Any) -> None:
    one, other = talk("Hi", "Yes?", "Name a fruit.", "A pear."), talk("Hi", "Yes?", "Name a tree.", "An oak.")
    apart = talk("Hello", "Yes?", "Name a fruit.", "A fig.")
    longer = talk("Well?", "So.", "why", "because", "and then?", "nothing")
    as_prompt = {**longer, "prompt": longer["prompt"][:3], "rejected": [{"role": "assistant", "content": "no"}]}
    as_prompt["group"] = prompt_group(as_prompt["prompt"])
    compared = {**talk("hey", "Yes?", "Name a fish.", "A carp."), "rejected": as_prompt["rejected"]}
    cleaned = sources(a=([one, other, apart, longer, compared], [pair("hi!"), as_prompt, pair("hey")]))
    metrics = blend(cleaned, {}, 0, folder("out"))
    out = folder("again").parent / "out"
    assert metrics["sources"]["a"]["train"] == {"rows_in": 5, "kept": 2, "drops": {"leak": 3}}
    assert prompts(rows_of(out)) == ["Hello", "hey"], "of a pair, only the last answer is learnt"
    merged = {row["name"] for row in read_table(out / "groups.arrow").to_list()}
    names = {row["group"] for row in (*rows_of(out), *rows_of(out, "test"))} | merged
    assert {prompt_group(longer["prompt"][:size]) for size in (1, 3, 5)} <= names
