from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tables import read_table
from data_prep.tokenizer import encode, load_tokenizer
from data_prep.unsupervised import TextSpec, chunk, documents, download_text

Folder = Callable[[str], Path]
WIKI = [" \n", " = Fox = \n", " \n", " The fox . \n", " = = Life = = \n", " Red . \n", " = Owl = \n", " It flies . \n"]
ARTICLE = r" = [^=]+ = $"


def test_an_article_begins_at_its_title() -> None:
    assert list(documents(WIKI, ARTICLE)) == [
        " \n",
        " = Fox = \n \n The fox . \n = = Life = = \n Red . \n",
        " = Owl = \n It flies . \n",
    ]
    assert list(documents(WIKI, None)) == WIKI


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([" = A = \n", "b\n", " \n"]), max_size=12))
def test_no_row_is_lost_between_documents(rows: list[str]) -> None:
    assert "".join(documents(rows, ARTICLE)) == "".join(rows)


def test_chunks_are_the_text_with_eos_between_documents(tmp_path: Path, folder: Folder, tokenizer_dir: Path) -> None:
    texts = [
        "Anna sees the pale ink.",
        "  ",
        "A young fox eats fresh soup in the old barn.",
        "spells <|endoftext|> out",
    ]
    (tmp_path / "texts.csv").write_text("id,body\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts)))
    spec = TextSpec("texts", path=str(tmp_path / "texts.csv"), column="body")
    assert download_text(spec, None, folder("raw"))["rows"] == {"train": 4}
    copytree(tmp_path / "raw" / "train", tmp_path / "raw" / "eval")
    counts = chunk(tmp_path / "raw", tokenizer_dir, 7, None, 0.5, folder("out"))
    tokenizer = load_tokenizer(tokenizer_dir)
    whole = [token for ids in encode(tokenizer, [texts[0], texts[2]]) for token in [*ids, tokenizer.eos_token_id]]
    rows = read_table(tmp_path / "out" / "ptx-train.arrow")["tokens"]
    assert {len(row) for row in rows} == {7}
    assert [token for row in rows for token in row] == whole[: len(whole) - len(whole) % 7]
    assert counts["train"] == {
        "documents": 2,
        "chunks": len(whole) // 7,
        "tokens": len(whole) // 7 * 7,
        "left_over": len(whole) % 7,
        "drops": {"empty": 1, "special_token": 1},
    }
    assert counts["eval"] == counts["train"]


def test_documents_are_held_out_where_there_is_no_test_split(
    tmp_path: Path, folder: Folder, tokenizer_dir: Path
) -> None:
    (tmp_path / "many.txt").write_text("".join(f"line {number}\n" for number in range(400)))
    download_text(TextSpec("many", path=str(tmp_path)), None, folder("raw"))
    counts = chunk(tmp_path / "raw", tokenizer_dir, 4, None, 0.25, folder("out"))
    assert counts["train"]["documents"] + counts["eval"]["documents"] == 400
    assert 60 < counts["eval"]["documents"] < 140


def test_a_set_of_a_mirror_with_splits_and_a_subset(tmp_path: Path, folder: Folder, tokenizer_dir: Path) -> None:
    files = folder("hub/someone/wiki/small")
    for split, rows in (("validation", WIKI * 20), ("test", WIKI)):
        pq.write_table(pa.table({"text": rows}), files / f"{split}-00000-of-00001.parquet")
    spec = TextSpec("someone/wiki", subset="small", train="validation", test="test")
    metrics = download_text(spec, str(tmp_path / "hub"), folder("raw"))
    assert metrics["rows"] == {"train": 160, "eval": 8}
    assert metrics["revision"] == "local"
    counts = chunk(tmp_path / "raw", tokenizer_dir, 16, ARTICLE, 0.5, folder("out"))
    assert counts["eval"]["documents"] == 2, "the set's own split, whatever eval_fraction says"
    assert counts["train"]["chunks"] > 20 > counts["eval"]["chunks"]
    with pytest.raises(ValueError, match="The unsupervised text fills no chunk of 100000 tokens"):
        chunk(tmp_path / "raw", tokenizer_dir, 100_000, ARTICLE, 0.5, folder("none"))
    with pytest.raises(ValueError, match="The held-out unsupervised text fills no chunk of 200 tokens"):
        chunk(tmp_path / "raw", tokenizer_dir, 200, ARTICLE, 0.5, folder("few"))
    with pytest.raises(ValueError, match="has no Parquet files of the split train: correct the split's name"):
        download_text(TextSpec("someone/wiki", subset="small"), str(tmp_path / "hub"), folder("raw2"))


def test_text_that_is_not_there(tmp_path: Path, folder: Folder) -> None:
    with pytest.raises(ValueError, match="There is no text at"):
        download_text(TextSpec("t", path=str(folder("empty"))), None, folder("a"))
    (tmp_path / "t.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"t \(t\.jsonl\) lacks the column text; found were body"):
        download_text(TextSpec("t", path=str(tmp_path / "t.jsonl")), None, folder("b"))
    (tmp_path / "t.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"t\.txt is no UTF-8 text"):
        download_text(TextSpec("t", path=str(tmp_path / "t.txt")), None, folder("c"))
