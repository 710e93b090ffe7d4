"""The ledger through the real blend and split: runs on data that grows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.blend import GROUPS_SCHEMA, blend
from data_prep.keys import prompt_group
from data_prep.ledger import Group, Home, Ledger, admit, digest_of, key_of, read_groups
from data_prep.splits import EVAL_KEYS, split
from data_prep.tables import PAIR_SCHEMA, iter_rows, write_table
from data_prep.trained import keep, trained_on

Folder = Callable[[str], Path]


def group(*names: str, tested: bool = False) -> Group:
    return Group([key_of(name) for name in names], tested)


def settled(ledger: Ledger, **groups: Group) -> dict[str, Home]:
    return ledger.settle(groups, 0.5, 0)


def sides(count: int, held_out: bool) -> list[str]:
    """Names of groups that a ledger which knows nothing deals to that side."""
    homes = Ledger().settle({f"g{number}": group(f"g{number}") for number in range(count)}, 0.5, 0)
    return [name for name, home in homes.items() if home.held_out == held_out]


TRAIN, EVAL = sides(40, False), sides(40, True)


def test_a_new_key_joins_the_home_of_a_known_one() -> None:
    ledger = Ledger()
    first = settled(ledger, **{EVAL[0]: group(EVAL[0])})
    assert first == {EVAL[0]: Home(EVAL[0], True)}
    # The merged group bears a new, smaller name, that would be dealt to train.
    assert settled(ledger, a=group("a", TRAIN[0], EVAL[0])) == {"a": Home(EVAL[0], True)}
    assert settled(ledger, **{TRAIN[0]: group(TRAIN[0])}) == {TRAIN[0]: Home(EVAL[0], True)}


def test_where_homes_meet_what_was_trained_on_leaves_evaluation() -> None:
    ledger = Ledger()
    trained, held_out = max(TRAIN), min(EVAL)
    settled(ledger, **{name: group(name) for name in (trained, held_out, EVAL[1])})
    met = settled(ledger, x=group("x", held_out, trained))
    assert met == {"x": Home(trained, False)}
    # Those that were merged before follow, whether they are in this set or not.
    settled(ledger, y=group("y", EVAL[1], "x"))
    for name in (trained, held_out, EVAL[1], "x", "y"):
        assert settled(ledger, **{name: group(name)}) == {name: Home(trained, False)}


def test_a_group_that_a_set_holds_out_is_held_out_unless_it_was_trained_on() -> None:
    ledger = Ledger()
    name = TRAIN[0]
    assert settled(Ledger(), **{name: group(name, tested=True)})[name].held_out
    settled(ledger, **{name: group(name)})
    assert not settled(ledger, **{name: group(name, tested=True)})[name].held_out


NAMES = [f"n{number}" for number in range(12)]
PARTITIONS = st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True), min_size=1, max_size=6)


def disjoint(parts: Sequence[Sequence[str]]) -> dict[str, Group]:
    taken: set[str] = set()
    groups = {}
    for part in parts:
        names = [name for name in part if name not in taken]
        taken |= set(names)
        if names:
            groups[min(names)] = group(*names)
    return groups


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTITIONS, min_size=1, max_size=6))
def test_whatever_comes_trained_groups_never_are_held_out_again(runs: list[list[list[str]]]) -> None:
    ledger, trained = Ledger(), set()
    for parts in runs:
        groups = disjoint(parts)
        homes = ledger.settle(groups, 0.5, 0)
        for name, home in homes.items():
            assert not home.held_out or trained.isdisjoint(groups[name].keys)
            trained |= set() if home.held_out else set(groups[name].keys)
        assert ledger.settle(groups, 0.5, 0) == homes
    for parts in runs:  # an earlier set again: the same answer every time
        groups = disjoint(parts)
        assert digest_of(ledger.settle(groups, 0.5, 0)) == digest_of(ledger.settle(groups, 0.5, 0))


def pair(name: str, group: str | None = None) -> dict[str, Any]:
    prompt = [{"role": "user", "content": name}]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "source": "s",
        "group": group or prompt_group(prompt),
        "weight": 1.0,
    }


def talk(first: str, second: str) -> dict[str, Any]:
    """A conversation of two questions, for SFT alone."""
    said = [{"role": "assistant", "content": "Yes?"}]
    return {**pair(second), "prompt": [*pair(first)["prompt"], *said, *pair(second)["prompt"]], "rejected": []}


@pytest.fixture
def blended(folder: Folder) -> Callable[..., Path]:
    """A blended set of these train and test rows."""

    def make(name: str, train: list[dict[str, Any]], test: Sequence[dict[str, Any]] = ()) -> Path:
        source = folder(f"{name}/clean")
        write_table(train, source / "train.arrow", PAIR_SCHEMA)
        write_table(test, source / "test.arrow", PAIR_SCHEMA)
        blend({"s": source}, {}, 0, folder(f"{name}/blend"))
        return source.parent / "blend"

    return make


def files_of(split_dir: Path) -> dict[str, set[str]]:
    """File -> the prompts in it."""
    return {
        path.stem: {row["prompt"][0]["content"] for row in iter_rows(path, ["prompt"])}
        for path in split_dir.glob("*-*.arrow")
        if path.name != EVAL_KEYS
    }


def run(blended: Path, out: Path, ledger: Path) -> dict[str, set[str]]:
    """A run's split, as the step makes it."""
    split(blended, (2, 4, 3, 1), 0.3, 0, out, ledger)
    admit(ledger, blended, 0.3, 0)
    return files_of(out)


def side(file: str) -> str:
    return file.rpartition("-")[2]


def test_a_second_run_on_grown_data(blended: Callable[..., Path], folder: Folder, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.parquet"
    old = [pair(f"old {number}") for number in range(300)]
    first = blended("first", old)
    one = run(first, folder("one"), ledger)
    known = digest_of(Ledger.read(ledger).settle(read_groups(first), 0.3, 0))
    assert known == digest_of(Ledger().settle(read_groups(first), 0.3, 0)), "the identity is the same before and after"
    written = ledger.stat().st_mtime_ns
    again = run(first, folder("again"), ledger)
    assert again == one
    assert ledger.stat().st_mtime_ns == written, "nothing new, nothing written"

    # Posts that join two old prompts each; new prompts; a test split that holds old train rows.
    joined = [pair(f"old {number}", f"post {number // 2}") for number in range(200)]
    new = [pair(f"new {number}") for number in range(300)]
    second = blended("second", joined + old[200:] + new, [pair("old 299"), pair("fresh")])
    two = run(second, folder("two"), ledger)
    home = {name: file for file, names in one.items() for name in names}
    moved = {name: (home[name], file) for file, names in two.items() for name in names if name in home}
    for before, after in moved.values():
        assert (side(before), side(after)) != ("train", "eval")
        assert before == after or side(before) != "train" or side(after) == "train"
    crossed = [number for number in range(0, 200, 2) if side(home[f"old {number}"]) != side(home[f"old {number + 1}"])]
    assert crossed, "the case that this is about"
    for number in crossed:
        assert {side(moved[f"old {n}"][1]) for n in (number, number + 1)} == {"train"}
    untouched = [name for name in moved if int(name.split()[1]) >= 200 and name != "old 299"]
    assert all(moved[name][0] == moved[name][1] for name in untouched)
    assert side(home["old 299"]) == "train", "the case that this is about"
    assert "old 299" not in moved, "neither trained on, as the set now tests on it, nor judged on"
    assert any("fresh" in names for file, names in two.items() if side(file) == "eval")

    # What is held out now is in no group that the first run trained on.
    models = [folder("model-1"), folder("model-2")]
    for model, run_of, ancestors in ((models[0], "one", []), (models[1], "two", [models[0]])):
        own = [np.load(tmp_path / run_of / f"{phase}-keys.npy") for phase in ("sft", "reward", "ppo")]
        keep(model, ancestors, np.concatenate(own))
    held_out = {key for row in iter_rows(tmp_path / "two" / EVAL_KEYS) for key in row["keys"]}
    assert held_out
    assert held_out.isdisjoint(trained_on(models).tolist())
    # Without the ledger, some of them would be.
    split(second, (2, 4, 3, 1), 0.3, 0, folder("forgetful"))
    forgotten = {key for row in iter_rows(tmp_path / "forgetful" / EVAL_KEYS) for key in row["keys"]}
    assert not forgotten.isdisjoint(trained_on(models[:1]).tolist())


def test_a_pair_that_comes_after_a_conversation_which_answers_its_prompt_on_its_way(
    blended: Callable[..., Path], folder: Folder, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.parquet"
    old = [pair(f"old {number}") for number in range(100)] + [talk(f"q {n}", f"then {n}") for n in range(100)]
    one = run(blended("first", old), folder("one"), ledger)
    learnt = {name for name in one["sft-train"] if name.startswith("q")}
    assert 50 < len(learnt) < 90
    two = run(blended("second", old + [pair(f"q {number}") for number in range(100)]), folder("two"), ledger)
    for name in (f"q {number}" for number in range(100)):
        (file,) = (file for file, names in two.items() if name in names)
        assert file == ("sft-train" if name in learnt else "sft-eval"), "the home of the conversation"
    prompts = {key_of(prompt_group(pair(name)["prompt"])) for name in learnt}
    assert prompts <= set(np.load(tmp_path / "one" / "sft-keys.npy").tolist()), "a model tells what it was trained on"


def test_the_first_run_is_as_if_there_were_no_ledger(blended: Callable[..., Path], folder: Folder) -> None:
    data = blended("data", [pair(f"p {number}", f"post {number // 3}") for number in range(400)])
    split(data, (2, 4, 4), 0.2, 0, folder("with"), data.parent / "none.parquet")
    split(data, (2, 4, 4), 0.2, 0, folder("without"))
    one, two = files_of(data.parents[1] / "with"), files_of(data.parents[1] / "without")
    assert one == two


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"The split ledger .* cannot be read .*restore it, or delete it"):
        Ledger.read(tmp_path / "ledger.parquet")


def test_a_ledger_reads_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger()
    homes = ledger.settle({name: group(name, f"{name}'") for name in NAMES}, 0.5, 0)
    ledger.write(tmp_path / "new" / "ledger.parquet")
    back = Ledger.read(tmp_path / "new" / "ledger.parquet")
    assert back.settle({name: group(f"{name}'") for name in NAMES}, 0.5, 7) == homes
    assert not back.changed


def test_groups_come_with_the_names_that_were_merged_into_them(folder: Folder) -> None:
    out = folder("in")
    write_table([pair("p", "a"), pair("q", "c")], out / "train.arrow", PAIR_SCHEMA)
    write_table([pair("r", "c")], out / "test.arrow", PAIR_SCHEMA)
    write_table([{"name": "b", "group": "a"}, {"name": "z", "group": "gone"}], out / "groups.arrow", GROUPS_SCHEMA)
    assert read_groups(out) == {"a": group("a", "b"), "c": group("c", tested=True)}
