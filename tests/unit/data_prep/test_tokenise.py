from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.tables import PAIR_SCHEMA, read_table, write_table
from data_prep.tokenise import tokenise
from data_prep.tokenizer import NEW_PAD, answer_ids, check_eos, load_tokenizer, prompt_ids

Row = dict[str, Any]
Folder = Callable[[str], Path]
EOS = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pair(prompt: str, chosen: str, rejected: str, weight: float = 1.0) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": "s",
        "group": prompt,
        "weight": weight,
    }


def write_split(folder: Path, rows: list[Row], phases: tuple[str, ...] = ("sft", "reward", "ppo")) -> Path:
    for phase in phases:
        for side in ("train", "eval"):
            write_table(rows, folder / f"{phase}-{side}.arrow", PAIR_SCHEMA)
    return folder


def test_prompt_and_answer_join_to_the_conversation(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    messages = [
        {"role": "user", "content": "Tell Anna about the kitchen."},
        {"role": "assistant", "content": "fresh soup."},
        {"role": "user", "content": "What else?"},
    ]
    answer = {"role": "assistant", "content": "hungry cook, wooden spoon."}
    ids = prompt_ids(tokenizer, messages), answer_ids(tokenizer, messages, answer)
    assert tokenizer.decode(ids[0]) == (
        f"\n\nHuman: Tell Anna about the kitchen.\n\nAssistant: fresh soup.{EOS}\n\nHuman: What else?\n\nAssistant:"
    )
    assert tokenizer.decode(ids[1]) == f" hungry cook, wooden spoon.{EOS}"
    assert ids[1].count(tokenizer.eos_token_id) == 1
    assert ids[1][-1] == tokenizer.eos_token_id


def test_a_chat_template_of_the_model_is_used_and_cut_after_eos(make_tokenizer: Callable[..., Path]) -> None:
    folder = make_tokenizer(
        special=("<|im_start|>", "<|im_end|>", "<pad>"),
        chat_template=CHATML,
        eos_token="<|im_end|>",
        pad_token="<pad>",
    )
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "hi"}]
    assert (
        tokenizer.decode(prompt_ids(tokenizer, messages)) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = answer_ids(tokenizer, messages, {"role": "assistant", "content": "yes"})
    assert tokenizer.decode(ids) == "yes<|im_end|>"
    assert tokenizer.pad_token == "<pad>"


def test_eos_is_added_where_the_template_writes_none(make_tokenizer: Callable[..., Path]) -> None:
    folder = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}", eos_token=EOS)
    tokenizer = load_tokenizer(folder)
    ids = answer_ids(tokenizer, [{"role": "user", "content": "hi"}], {"role": "assistant", "content": "yes"})
    assert tokenizer.decode(ids) == f"yes\n{EOS}"


def test_a_template_that_rewrites_the_prompt_is_refused(make_tokenizer: Callable[..., Path]) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = load_tokenizer(make_tokenizer(chat_template=template, eos_token=EOS))
    with pytest.raises(ValueError, match="chat template changes the text before an answer"):
        answer_ids(tokenizer, [{"role": "user", "content": "hi"}], {"role": "assistant", "content": "yes"})


@pytest.mark.parametrize(
    ("special", "named", "pad"),
    [
        ((EOS, "<|padding|>", "<|reserved_0|>"), {}, "<|padding|>"),
        ((EOS, "<|reserved_0|>"), {}, "<|reserved_0|>"),
        ((EOS, "<|reserved_0|>"), {"pad_token": EOS}, "<|reserved_0|>"),
        ((EOS, "<unk>"), {"unk_token": "<unk>", "pad_token": EOS}, "<unk>"),
        ((EOS,), {"unk_token": EOS, "pad_token": EOS}, NEW_PAD),
        ((EOS,), {"bos_token": EOS}, NEW_PAD),
        ((EOS, "<unk>", "<mine>"), {"unk_token": "<unk>", "pad_token": "<mine>"}, "<mine>"),
    ],
)
def test_the_pad_token_is_never_eos(
    make_tokenizer: Callable[..., Path], special: tuple[str, ...], named: dict[str, str], pad: str
) -> None:
    tokenizer = load_tokenizer(make_tokenizer(special=special, eos_token=EOS, **named))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == EOS


def test_folders_without_a_usable_tokenizer(folder: Folder, make_tokenizer: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer: copy"):
        load_tokenizer(folder("empty"))
    with pytest.raises(ValueError, match="There is no folder /nowhere/model"):
        load_tokenizer("/nowhere/model")
    with pytest.raises(ValueError, match="has no EOS token"):
        load_tokenizer(make_tokenizer())
    (folder("broken") / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"No tokenizer could be loaded from .*broken"):
        load_tokenizer(folder("x").parent / "broken")


@pytest.mark.parametrize(
    ("model", "generation", "good"),
    [
        ({"eos_token_id": 0}, None, True),
        ({"eos_token_id": [5, 0]}, {}, True),
        ({"eos_token_id": 7}, {"eos_token_id": [0, 7]}, True),
        ({}, None, True),
        ({"eos_token_id": None}, {"eos_token_id": None}, True),
        ({"eos_token_id": 7}, None, False),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, False),
    ],
)
def test_check_eos(tokenizer_dir: Path, model: Row, generation: Row | None, good: bool) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.eos_token_id == 0
    if good:
        check_eos(tokenizer, model, generation)
    else:
        with pytest.raises(ValueError, match=r"id 0.* the model with 7.*make eos_token_id the same"):
            check_eos(tokenizer, model, generation)


def test_tables_hold_what_each_phase_trains_on(folder: Folder, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    long = "What does Anna see? " * 20
    rows = [
        pair("hi", "fresh soup.", "pale ink.", weight=2.0),
        pair("hi", "fresh soup.", "heavy axe."),
        pair("hi", "young fox.", "heavy axe."),
        pair(long, "fresh soup.", "pale ink."),
        pair("who?", long, "heavy axe."),
        pair("who?", "pale ink.", long + "No."),
        pair("who?", f"never {EOS} so", "heavy axe."),
    ]
    split_dir = write_split(folder("split"), rows, ("sft", "reward", "ppo", "judge"))
    out = folder("out")
    metrics = tokenise(split_dir, tokenizer_dir, 40, 40, out)

    assert metrics["reward"]["train"]["drops"] == {"answer_too_long": 2, "prompt_too_long": 1, "special_token": 1}
    assert metrics["sft"]["eval"]["drops"] == {
        "answer_too_long": 1,
        "duplicate": 1,
        "prompt_too_long": 1,
        "special_token": 1,
    }
    assert metrics["ppo"]["train"]["drops"] == {"duplicate": 4, "prompt_too_long": 1}
    for phase, sides in metrics.items():
        for side, counts in sides.items():
            # Reward models and policies are judged on what is held out in all four phases.
            assert counts["rows_in"] == (28 if side == "eval" and phase != "sft" else 7)
            assert counts["rows_in"] == counts["kept"] + sum(counts["drops"].values())

    sft, reward, ppo = (read_table(out / f"{phase}-train.arrow") for phase in ("sft", "reward", "ppo"))
    assert sft.column_names == ["prompt", "answer", "others", "source", "group"]
    assert [tokenizer.decode(ids) for ids in sft["answer"]] == [
        f" fresh soup.{EOS}",
        f" young fox.{EOS}",
        f" pale ink.{EOS}",
    ]
    assert reward.column_names == ["prompt", "chosen", "rejected", "weight", "source", "group"]
    assert reward["weight"][:2] == [2.0, 1.0]
    assert tokenizer.decode(reward[1]["rejected"]) == f" heavy axe.{EOS}"
    assert ppo.column_names == ["prompt", "messages", "source", "group"]
    assert ppo["messages"][0] == [{"role": "user", "content": "hi"}]
    assert [tokenizer.decode(ids) for ids in ppo["prompt"]] == [
        "\n\nHuman: hi\n\nAssistant:",
        "\n\nHuman: who?\n\nAssistant:",
    ]
    assert (out / "judge-eval.arrow").read_bytes() == (out / "reward-eval.arrow").read_bytes()
    tokens = metrics["reward"]["train"]["tokens"]["chosen"]
    assert tokens["sum"] == sum(len(ids) for ids in reward["chosen"])
    assert tokens["max"] == max(len(ids) for ids in reward["chosen"])


def test_the_first_held_out_rows_are_of_all_sources_and_stay_the_first(folder: Folder, tokenizer_dir: Path) -> None:
    rows = [  # each set is one large group
        {**pair(f"{name} {n}", "fresh soup.", "pale ink."), "source": name, "group": name}
        for name in ("a", "b", "c")
        for n in range(30)
    ]
    own, others = rows[:80], rows[80:]
    split_dir = write_split(folder("split"), others)
    write_table(own, split_dir / "reward-eval.arrow", PAIR_SCHEMA)
    out = folder("out")
    tokenise(split_dir, tokenizer_dir, 40, 40, out)
    first, train = (read_table(out / f"reward-{side}.arrow") for side in ("eval", "train"))
    assert set(first["source"][:12]) == {"a", "b", "c"}
    assert Counter(first["source"][:80]) == Counter(row["source"] for row in own)  # its own phase's before others
    tokenizer = load_tokenizer(tokenizer_dir)
    assert train["prompt"] == [prompt_ids(tokenizer, row["prompt"]) for row in others]  # training shuffles by itself

    left_out = own.pop(7)
    write_table(own[::-1], split_dir / "reward-eval.arrow", PAIR_SCHEMA)
    out = folder("again")
    tokenise(split_dir, tokenizer_dir, 40, 40, out)
    without = [ids for ids in first["prompt"] if ids != prompt_ids(tokenizer, left_out["prompt"])]
    assert read_table(out / "reward-eval.arrow")["prompt"] == without


def test_the_limit_counts_eos_and_nothing_is_cut(folder: Folder, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    row = pair("hi", "fresh soup, pale ink.", "heavy axe.")
    exact = len(answer_ids(tokenizer, row["prompt"], row["chosen"][0]))
    prompt = len(prompt_ids(tokenizer, row["prompt"]))
    split_dir = write_split(folder("split"), [row])
    assert tokenise(split_dir, tokenizer_dir, prompt, exact, folder("a"))["sft"]["train"]["kept"] == 1
    with pytest.raises(ValueError, match=rf"No train row of sft .*\(answer_too_long 1\).*\(now {exact - 1}\)"):
        tokenise(split_dir, tokenizer_dir, prompt, exact - 1, folder("b"))
    with pytest.raises(ValueError, match=r"No train row of sft .*\(prompt_too_long 1\).*data\.max_prompt_tokens"):
        tokenise(split_dir, tokenizer_dir, prompt - 1, exact, folder("c"))


def test_an_empty_folder_is_no_split(folder: Folder, tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match="holds no split tables"):
        tokenise(folder("split"), tokenizer_dir, 10, 10, folder("out"))
