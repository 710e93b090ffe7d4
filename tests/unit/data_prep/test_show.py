from pathlib import Path

import pytest

from data_prep.conversation import Message
from data_prep.show import Segment, find_source, segments, shown
from data_prep.tables import write_table
from data_prep.tokenise import SCHEMAS
from data_prep.tokenizer import answer_ids, load_tokenizer, prompt_ids

NAMES = ["Dahoas/rm-static", "openai/webgpt_comparisons", "stanfordnlp/SHP"]


@pytest.fixture
def table(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """reward-train.arrow with a row of one source and two of another."""
    tokenizer = load_tokenizer(tokenizer_dir)
    prompt = [Message(role="user", content="Which one?")]
    ids = {name: answer_ids(tokenizer, prompt, Message(role="assistant", content=name)) for name in ("yes", "no")}
    row = {"prompt": prompt_ids(tokenizer, prompt), "chosen": ids["yes"], "rejected": ids["no"], "weight": 1.0}
    sources = (NAMES[0], NAMES[2], NAMES[2])
    write_table([{**row, "source": name} for name in sources], tmp_path / "reward-train.arrow", SCHEMAS["reward"])
    return tmp_path / "reward-train.arrow"


def test_row_is_shown_with_prompt_answer_and_eos_apart(table: Path, tokenizer_dir: Path) -> None:
    chosen, rejected = shown(table, "reward", load_tokenizer(tokenizer_dir), "shp", 1)
    assert (chosen.source, chosen.answer, rejected.answer) == ("stanfordnlp/SHP", "chosen", "rejected")
    assert chosen.segments == [
        Segment("\n\nHuman: Which one?\n\nAssistant:", False, False),
        Segment(" yes", True, False),
        Segment("<|endoftext|>", True, True),
    ]
    assert "".join(part.text for part in rejected.segments).endswith("Assistant: no<|endoftext|>")


def test_so_many_rows_are_shown_as_there_are(table: Path, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert len(shown(table, "reward", tokenizer, None, 2)) == 2 * 2
    assert len(shown(table, "reward", tokenizer, "SHP", 9)) == 2 * 2


def test_neighbouring_special_tokens_stand_alone(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    end = tokenizer.eos_token_id
    assert segments(tokenizer, [end, end], [False, False]) == [Segment("<|endoftext|>", False, True)] * 2


@pytest.mark.parametrize("name", ["SHP", "shp", "stanfordnlp/shp", "stanfordnlp/SHP"])
def test_source_is_found_by_its_last_part_or_whole_name(name: str) -> None:
    assert find_source(name, NAMES) == "stanfordnlp/SHP"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("rm-statik", "no row here is from a source rm-statik; did you mean Dahoas/rm-static?"),
        ("webgpt", "did you mean openai/webgpt_comparisons?"),
        ("###", "they are: Dahoas/rm-static, openai/webgpt_comparisons, stanfordnlp/SHP"),
    ],
)
def test_unknown_source_is_one_sentence_with_near_names(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"no row here") as raised:
        find_source(name, NAMES)
    assert sentence in str(raised.value)


def test_last_part_that_two_sources_share_is_refused() -> None:
    with pytest.raises(ValueError, match="several sources are called b: a/b, c/b; give the whole name"):
        find_source("b", ["a/b", "c/b"])
    assert find_source("b", ["a/b", "b"]) == "b"
