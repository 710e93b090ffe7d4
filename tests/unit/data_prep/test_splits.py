from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.blend import GROUPS_SCHEMA
from data_prep.splits import check_no_leak, check_no_prompt_leaks, phase_of, split
from data_prep.tables import PAIR_SCHEMA, iter_rows, write_table

Folder = Callable[[str], Path]


def row(group: str, number: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"{group} {number}"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "source": "s",
        "group": group,
        "weight": 1.0,
    }


def write_blended(folder: Path, train: list[str], test: list[str]) -> None:
    for side, groups in (("train", train), ("test", test)):
        write_table([row(group, number) for number, group in enumerate(groups)], folder / f"{side}.arrow", PAIR_SCHEMA)
    write_table([], folder / "groups.arrow", GROUPS_SCHEMA)


def groups_by_file(folder: Path) -> dict[str, Counter[str]]:
    return {
        path.stem: Counter(line["group"] for line in iter_rows(path, ["group"]))
        for path in folder.glob("*-*.arrow")
        if path.stem != "eval-keys"
    }


GROUPS = st.lists(st.integers(0, 60), min_size=60, max_size=150).map(
    lambda numbers: [f"g{number}" for number in [*range(120), *numbers]]
)


@settings(max_examples=25, deadline=None)
@given(GROUPS, st.integers(0, 10**6), st.sampled_from([(2, 4, 4), (1, 1, 1), (2, 4, 3, 1)]))
def test_no_group_is_in_two_files_and_no_row_is_lost(groups: list[str], seed: int, ratio: tuple[float, ...]) -> None:
    held_out = [f"t{number}" for number in range(60)]
    with TemporaryDirectory() as name:
        blended, out = Path(name) / "in", Path(name) / "out"
        blended.mkdir()
        out.mkdir()
        write_blended(blended, groups, held_out)
        metrics = split(blended, ratio, 0.25, seed, out)
        files = groups_by_file(out)
    homes = Counter(group for counts in files.values() for group in counts)
    assert set(homes.values()) == {1}
    assert sum(files.values(), Counter()) == Counter(groups) + Counter(held_out)
    for file, counts in files.items():
        phase, side = file.split("-")
        assert metrics[phase][side] == {"rows": counts.total(), "groups": len(counts)}
        assert side == "eval" or not set(counts) & set(held_out)


def test_phases_get_their_share_and_groups_stay_when_others_arrive(folder: Folder) -> None:
    phases = Counter(phase_of(f"g{number}", (2, 4, 4), 7) for number in range(5000))
    assert abs(phases["sft"] / 5000 - 0.2) < 0.02
    assert abs(phases["reward"] / 5000 - 0.4) < 0.02
    assert phase_of("g1", (2, 4, 4), 7) == phase_of("g1", (20, 40, 40), 7)
    homes = []
    for name, count in (("few", 300), ("many", 600)):
        write_blended(folder(name), [f"g{number}" for number in range(count)], [])
        out = folder(f"{name}-out")
        split(out.parent / name, (2, 4, 4), 0.2, 0, out)
        homes.append({group: file for file, groups in groups_by_file(out).items() for group in groups})
    assert homes[0].items() <= homes[1].items()
    held_out = sum(file.endswith("eval") for file in homes[1].values())
    assert 80 < held_out < 160


def test_the_seed_changes_the_split_and_nothing_else_does(folder: Folder) -> None:
    write_blended(folder("in"), [f"g{number}" for number in range(200)], ["t1"])
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = folder(name)
        split(out.parent / "in", (2, 4, 4), 0.3, seed, out)
        digests.append([path.read_bytes() for path in sorted(out.iterdir())])
    assert digests[0] == digests[1] != digests[2]


def test_an_empty_file_is_named_with_the_mend(folder: Folder) -> None:
    write_blended(folder("in"), [f"g{number}" for number in range(200)], [])
    out = folder("out")
    with pytest.raises(ValueError, match=r"The eval rows of sft came out empty: .*data\.eval_fraction"):
        split(out.parent / "in", (2, 4, 4), 0.0, 0, out)
    write_blended(folder("few"), ["g"], [f"t{number}" for number in range(50)])
    with pytest.raises(ValueError, match=r"The train rows of \w+ came out empty: .*data\.phases"):
        split(out.parent / "few", (2, 4, 4), 0.0, 0, folder("out2"))


@pytest.mark.parametrize("ratio", [(1, 2), (1, 2, 3, 4, 5), (0, 1, 1), (1, -1, 1), (1, 1, float("nan"))])
def test_a_bad_ratio(folder: Folder, ratio: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.phases is"):
        split(folder("in"), ratio, 0.1, 0, folder("out"))


def test_a_bad_eval_fraction(folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"data\.eval_fraction is 1"):
        split(folder("in"), (2, 4, 4), 1.0, 0, folder("out"))


def test_a_leak_fails_and_names_its_group() -> None:
    files = {("sft", "train"): ["a", "b", "b"], ("ppo", "train"): ["c"], ("reward", "eval"): ["d", "b"]}
    with pytest.raises(RuntimeError, match="The group b leaks: it is in sft-train and in reward-eval"):
        check_no_leak(files)
    check_no_leak(files | {("reward", "eval"): ["d"]})


def test_a_near_prompt_in_another_file_fails_whatever_the_groups_say(folder: Folder) -> None:
    out = folder("out")
    words = " ".join(f"word{number}" for number in range(60))
    paths = {("sft", "train"): out / "a.arrow", ("ppo", "eval"): out / "b.arrow"}
    write_table([row("far", 0), row(words, 1)], out / "a.arrow", PAIR_SCHEMA)
    write_table([row("other", 2)], out / "b.arrow", PAIR_SCHEMA)
    check_no_prompt_leaks(paths)
    for prompt in (f"{words} 2", f"{words}, 1!"):  # near, and the same after normalising
        near = {**row("g", 0), "prompt": [{"role": "user", "content": prompt}]}
        write_table([row("other", 2), near], out / "b.arrow", PAIR_SCHEMA)
        with pytest.raises(RuntimeError, match=r"A prompt leaks: .* is in sft-train and in ppo-eval: 'word0 "):
            check_no_prompt_leaks(paths)


def test_a_prompt_that_a_conversation_of_sft_answers_on_its_way_fails_elsewhere(folder: Folder) -> None:
    out = folder("out")
    paths = {("sft", "train"): out / "a.arrow", ("ppo", "eval"): out / "b.arrow"}
    talk = row("talk", 1)
    talk["prompt"] = [*row("Hi", 0)["prompt"], {"role": "assistant", "content": "Yes?"}, *talk["prompt"]]
    write_table([row("hi", 0)], out / "b.arrow", PAIR_SCHEMA)
    write_table([talk], out / "a.arrow", PAIR_SCHEMA)
    check_no_prompt_leaks(paths)  # of a pair, only the last answer is learnt
    write_table([{**talk, "rejected": []}], out / "a.arrow", PAIR_SCHEMA)
    with pytest.raises(RuntimeError, match=r"A prompt leaks: .* is in sft-train and in ppo-eval: 'hi 0'"):
        check_no_prompt_leaks(paths)
