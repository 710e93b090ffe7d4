"""SFT-only and ranked sets, from the user's file to the rows that are trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.blend import blend
from data_prep.clean import clean
from data_prep.conversation import HUMAN_ASSISTANT_TEMPLATE
from data_prep.kinds import kind_of, ranked_pairs
from data_prep.ledger import SFT_ONLY, Ledger, admit, read_groups
from data_prep.sources import SourceSpec, download
from data_prep.splits import split
from data_prep.tables import PAIR_SCHEMA, iter_rows, read_table, write_table
from data_prep.tokenise import tokenise
from data_prep.tokenizer import load_tokenizer, turn_texts
from tasks.training.batches import learnt_places

Folder = Callable[[str], Path]
Row = dict[str, Any]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: thoughts stand in the last answer only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


TALK = [user("Hi"), assistant("Yes?"), user("Name a fruit."), assistant("A pear.")]


def jsonl(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def cleaned(spec: SourceSpec, root: Path) -> tuple[list[Row], dict[str, Any]]:
    for name in ("raw", "clean"):
        (root / spec.name / name).mkdir(parents=True)
    download(spec, None, root / spec.name / "raw")
    metrics = clean(spec, root / spec.name / "raw", root / spec.name / "clean")
    return list(read_table(root / spec.name / "clean" / "train.arrow").to_list()), metrics["train"]


def test_a_conversation_is_read_with_its_last_answer_and_none_rejected(tmp_path: Path) -> None:
    rows = [
        {"messages": TALK},
        {"messages": [user("And then?")]},
        {"messages": [user("Why?"), assistant(" ")]},
        {"messages": TALK},
    ]
    kept, metrics = cleaned(SourceSpec("mine", path=jsonl(tmp_path / "mine.jsonl", rows)), tmp_path)
    assert metrics == {
        "rows_in": 4,
        "kept": 1,
        "drops": {"duplicate": 1, "empty": 2},
        "fixes": {},
    }
    assert (kept[0]["prompt"], kept[0]["chosen"], kept[0]["rejected"]) == (TALK[:3], TALK[3:], [])


def test_a_conversation_may_be_a_text(tmp_path: Path) -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Name a fruit.\n\nAssistant: A pear."
    kept, _ = cleaned(SourceSpec("mine", path=jsonl(tmp_path / "m.jsonl", [{"messages": text}])), tmp_path)
    assert kept[0]["prompt"] + kept[0]["chosen"] == TALK


def test_ranked_answers_become_all_pairs_of_one_group(tmp_path: Path) -> None:
    row = {"prompt": "Name a fruit.", "responses": ["pear", "stone", "plum", "fig"], "scores": [3, 1, 2, 2]}
    kept, metrics = cleaned(SourceSpec("mine", path=jsonl(tmp_path / "mine.jsonl", [row])), tmp_path)
    better = {(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in kept}
    assert better == {("pear", "stone"), ("pear", "plum"), ("pear", "fig"), ("plum", "stone"), ("fig", "stone")}
    assert metrics["rows_in"] == 6
    assert metrics["drops"] == {"tie": 1}
    assert [r["weight"] for r in kept] == pytest.approx([1 / 6] * 5)
    assert len({r["group"] for r in kept}) == 1


def test_ranked_answers_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text('prompt,responses,scores\nq,"[""a"", ""b""]","[1, 2.5]"\n')
    kept, _ = cleaned(SourceSpec("mine", path=str(tmp_path / "mine.csv")), tmp_path)
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"], r["weight"]) for r in kept] == [("b", "a", 1.0)]


@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_prompt_counts_once_however_many_answers_it_has(count: int) -> None:
    row = {"prompt": "q", "responses": list("abcdefghi"[:count]), "scores": list(range(count))}
    pairs = list(ranked_pairs("s", row))
    assert sum(pair["weight"] for pair in pairs) == pytest.approx(1.0)
    assert len(pairs) == count * (count - 1) // 2


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("prompt", "chosen", "rejected", "extra"), "pairs"),
        (("messages", "id"), "sft"),
        (("prompt", "responses", "scores"), "ranked"),
    ],
)
def test_the_columns_tell_the_kind(columns: tuple[str, ...], kind: str) -> None:
    assert kind_of("s", columns) == kind


def test_columns_that_tell_too_much_or_too_little(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be read as pairs and as sft: set its kind"):
        kind_of("s", ["messages", "prompt", "chosen", "rejected"])
    with pytest.raises(ValueError, match="lacks the column scores; found were prompt, responses"):
        kind_of("s", ["prompt", "responses"])
    for row, sentence in (
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "2 responses with 1 scores"),
        ({"prompt": "q", "responses": "a", "scores": [1]}, "responses or scores that are no lists"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1.0, float("nan")]}, r"scores \[1.0, nan\]: .* finite"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": "[1, Infinity]"}, r"scores \[1.0, inf\]: .* finite"),
    ):
        with pytest.raises(ValueError, match=sentence):
            list(ranked_pairs("s", row))


def test_any_set_of_the_hub_whose_kind_is_given(tmp_path: Path, folder: Folder) -> None:
    data = folder("hub/someone/chats/data")
    for name, rows in (("train", [TALK, TALK[:2]]), ("test", [TALK])):
        pq.write_table(pa.table({"messages": rows}), data / f"{name}-00000-of-00001.parquet")
    spec = SourceSpec("someone/chats", kind="sft")
    assert download(spec, str(tmp_path / "hub"), folder("raw"))["rows"] == {"train": 2, "test": 1}
    assert clean(spec, tmp_path / "raw", folder("clean"))["total"]["kept"] == 3
    with pytest.raises(ValueError, match=r"Unknown source 'someone/chats'.*for another set, its kind"):
        SourceSpec("someone/chats")
    with pytest.raises(ValueError, match="rows of stanfordnlp/SHP are pairs: leave its kind out"):
        SourceSpec("stanfordnlp/SHP", kind="sft")


def test_only_sft_gets_what_is_not_compared(tmp_path: Path, folder: Folder) -> None:
    pairs = [{"prompt": f"p {n}", "chosen": "yes", "rejected": "no"} for n in range(300)]
    talks = [{"messages": [user(f"t {n}"), assistant("well")]} for n in range(100)]
    talks += [{"messages": [user(f"p {n}"), assistant("indeed")]} for n in range(100)]  # of prompts that are compared
    sources = {}
    for name, rows in (("pairs", pairs), ("talks", talks)):
        cleaned(SourceSpec(name, path=jsonl(tmp_path / f"{name}.jsonl", rows)), tmp_path)
        sources[name] = tmp_path / name / "clean"
    blend(sources, {}, 0, folder("blend"))
    ledger = tmp_path / "ledger.parquet"
    metrics = split(tmp_path / "blend", (2, 4, 3, 1), 0.2, 0, folder("split"), ledger)
    tables = {path.stem: list(iter_rows(path)) for path in (tmp_path / "split").glob("*-*[nl].arrow")}
    sft = [row for name in ("sft-train", "sft-eval") for row in tables[name]]
    assert sum(row["source"] == "talks" and row["prompt"][0]["content"].startswith("t") for row in sft) == 100
    mixed = sum(row["source"] == "talks" and row["prompt"][0]["content"].startswith("p") for row in sft)
    assert mixed + metrics["left_out"]["sft_only"] == 100
    assert 0 < mixed < 100
    assert not any(row["source"] == "talks" for name, rows in tables.items() if "sft" not in name for row in rows)
    # A pair that comes later does not take a conversation out of SFT.
    admit(ledger, tmp_path / "blend", 0.2, 0)
    groups = read_groups(tmp_path / "blend")
    name = next(name for name, group in groups.items() if group.sft_only)
    later = {name: groups[name]._replace(sft_only=False)}
    assert Ledger.read(ledger).settle(later, 0.2, 0)[name].name == SFT_ONLY + name


def write_split(folder: Path, rows: list[Row]) -> Path:
    for name in ("sft-train", "sft-eval"):
        rows = [{"weight": 1.0, "source": "s", "group": "g", **row} for row in rows]
        write_table(rows, folder / f"{name}.arrow", PAIR_SCHEMA)
    return folder


def learnt_text(row: Row, tokenizer: Any) -> list[str]:
    """What a row's loss mask covers, run by run."""
    ids, places = row["prompt"] + row["answer"], learnt_places(row)
    runs: list[list[int]] = []
    for place in places:
        if place - 1 not in places:
            runs.append([])
        runs[-1].append(ids[place])
    return [tokenizer.decode(run) for run in runs]


def test_every_answer_of_a_conversation_is_learnt_with_its_eos(folder: Folder, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    talk = {"prompt": TALK[:3], "chosen": TALK[3:], "rejected": []}
    pair = {"prompt": [user("Hi"), assistant("Yes?"), user("Bye")], "chosen": TALK[3:], "rejected": TALK[1:2]}
    metrics = tokenise(write_split(folder("split"), [talk, pair]), tokenizer_dir, 60, 40, folder("out"))
    whole, compared = read_table(folder("x").parent / "out" / "sft-train.arrow").to_list()
    eos = tokenizer.eos_token
    assert learnt_text(whole, tokenizer) == [f" Yes?{eos}", f" A pear.{eos}"]
    assert learnt_text(compared, tokenizer) == [f" A pear.{eos}"], "of a pair, only the answer that was preferred"
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(whole["prompt"] + whole["answer"]) == text
    assert metrics["sft"]["train"]["drops"] == {}
    dropped = tokenise(
        write_split(folder("split2"), [talk, {**pair, "prompt": [user("Hi")]}]), tokenizer_dir, 14, 12, folder("out2")
    )
    assert dropped["sft"]["train"]["drops"] == {"conversation_too_long": 1}


def test_a_held_out_conversation_is_a_prompt_only_if_its_prompt_is_short_enough(
    folder: Folder, tokenizer_dir: Path
) -> None:
    talk = {"prompt": TALK[:3], "chosen": TALK[3:], "rejected": [], "weight": 1.0, "source": "s", "group": "g"}
    pair = {**talk, "prompt": [user("Hi")], "rejected": TALK[1:2]}
    split_dir = write_split(folder("split"), [talk])
    for name, rows in (("ppo-train", [pair]), ("ppo-eval", [pair, talk])):
        write_table(rows, split_dir / f"{name}.arrow", PAIR_SCHEMA)
    metrics = tokenise(split_dir, tokenizer_dir, 20, 100, folder("out"))
    assert metrics["sft"]["eval"]["kept"] == 1, "all of it is learnt, and may be as long as prompt and answer"
    assert metrics["ppo"]["eval"]["kept"] == 1
    assert metrics["ppo"]["eval"]["drops"] == {"duplicate": 1, "prompt_too_long": 1}


@pytest.mark.parametrize("template", [CHATML, THINKING, HUMAN_ASSISTANT_TEMPLATE])
def test_the_texts_of_a_conversation_in_other_templates(make_tokenizer: Any, template: str) -> None:
    tokenizer = load_tokenizer(make_tokenizer(special=("<|im_end|>",), chat_template=template, eos_token="<|im_end|>"))
    texts = turn_texts(tokenizer, TALK)
    assert "".join(texts) == tokenizer.apply_chat_template(TALK, tokenize=False).removesuffix("\n")
    answers = [text.removeprefix("<think></think>").strip() for text in texts[1::2]]
    assert answers == ["Yes?<|im_end|>", "A pear.<|im_end|>"]


def test_an_answer_that_the_template_leaves_out_of_the_history_is_not_learnt(make_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}[{{ m.content }}]{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    tokenizer = load_tokenizer(make_tokenizer(chat_template=template, eos_token="<|endoftext|>"))
    assert turn_texts(tokenizer, TALK) == ["[Hi][Name a fruit.]", "[A pear.]<|endoftext|>"]


def test_of_ranked_answers_sft_learns_the_best(folder: Folder, tokenizer_dir: Path) -> None:
    rows = [
        {"prompt": [user("q")], "chosen": [assistant(a)], "rejected": [assistant(b)]}
        for a, b in (("gold", "silver"), ("gold", "iron"), ("silver", "iron"))
    ]
    metrics = tokenise(write_split(folder("split"), rows), tokenizer_dir, 60, 40, folder("out"))
    assert metrics["sft"]["train"]["kept"] == 1
    assert metrics["sft"]["train"]["drops"] == {"duplicate": 1, "outranked": 1}
    (row,) = read_table(folder("x").parent / "out" / "sft-train.arrow").to_list()
    assert "gold" in load_tokenizer(tokenizer_dir).decode(row["answer"])
