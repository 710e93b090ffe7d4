import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

import data_prep.sources as sources
from data_prep.clean import clean
from data_prep.kinds import check_columns
from data_prep.sources import SOURCES, SourceSpec, download
from data_prep.tables import read_table

Folder = Callable[[str], Path]

TEXT_ROWS = [
    {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A\nstone."},
    {"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:", "chosen": " So long.", "rejected": "No"},
]
MESSAGE_ROWS = [
    {
        "prompt": [{"role": "user", "content": "Name a fruit."}],
        "chosen": [{"role": "assistant", "content": "A pear."}],
        "rejected": [{"role": "assistant", "content": "A\nstone."}],
    },
    {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Bye"},
        ],
        "chosen": [{"role": "assistant", "content": "So long."}],
        "rejected": [{"role": "assistant", "content": "No"}],
    },
]


def write_local(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        pd.DataFrame(cells).to_csv(path, index=False)


@pytest.mark.parametrize("rows", [TEXT_ROWS, MESSAGE_ROWS], ids=["text", "messages"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_local_files_of_every_kind_give_the_same_pairs(tmp_path: Path, folder: Folder, suffix: str, rows: Any) -> None:
    path = tmp_path / f"mine{suffix}"
    write_local(path, rows)
    spec = SourceSpec("mine", path=str(path))
    metrics = download(spec, None, folder("raw"))
    assert metrics["rows"] == {"train": 2}
    assert metrics["revision"] == "local"
    clean(spec, tmp_path / "raw", folder("clean"))
    pairs = read_table(tmp_path / "clean" / "train.arrow").select_columns(["prompt", "chosen", "rejected"])
    assert pairs.to_list() == MESSAGE_ROWS
    assert read_table(tmp_path / "clean" / "test.arrow").num_rows == 0


def test_a_local_folder_brings_its_own_test(tmp_path: Path, folder: Folder) -> None:
    files = folder("mine")
    write_local(files / "train.jsonl", TEXT_ROWS)
    write_local(files / "test.csv", TEXT_ROWS[:1])
    spec = SourceSpec("mine", path=str(files))
    assert download(spec, None, folder("raw"))["rows"] == {"train": 2, "test": 1}
    assert clean(spec, tmp_path / "raw", folder("clean"))["test"]["kept"] == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "x", "none of .json"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt', "cannot be read as jsonl"),
        ("a.json", "[1, 2]", "cannot be read as json"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.csv", "", "cannot be read as csv"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}', "lacks the columns chosen, rejected; found were prompt, answer"),
        ("a.jsonl", '{"prompt": 1, "chosen": "b", "rejected": "c"}', "column prompt of .* holds int64"),
        ("a.jsonl", '{"prompt": [{"text": "a"}], "chosen": "b", "rejected": "c"}', "column prompt of .* holds list"),
    ],
)
def test_bad_local_files_get_a_sentence(tmp_path: Path, folder: Folder, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        download(SourceSpec("mine", path=str(tmp_path / name)), None, folder("raw"))


def test_an_empty_cell_leaves_a_csv_columns_messages_what_they_are(tmp_path: Path, folder: Folder) -> None:
    write_local(tmp_path / "mine.csv", [*MESSAGE_ROWS, {**MESSAGE_ROWS[0], "prompt": ""}])
    spec = SourceSpec("mine", path=str(tmp_path / "mine.csv"))
    download(spec, None, folder("raw"))
    assert clean(spec, tmp_path / "raw", folder("clean"))["train"]["drops"] == {"empty": 1}
    pairs = read_table(tmp_path / "clean" / "train.arrow").select_columns(["prompt", "chosen", "rejected"])
    assert pairs.to_list() == MESSAGE_ROWS


def test_a_csv_column_is_messages_or_text_and_a_text_may_be_json(tmp_path: Path, folder: Folder) -> None:
    write_local(tmp_path / "mixed.csv", [MESSAGE_ROWS[0], {**MESSAGE_ROWS[0], "prompt": "Name a fruit."}])
    with pytest.raises(ValueError, match=r"mixed\.csv cannot be read as csv: the column prompt holds messages in some"):
        download(SourceSpec("mine", path=str(tmp_path / "mixed.csv")), None, folder("raw"))
    write_local(tmp_path / "text.csv", [TEXT_ROWS[0], {**TEXT_ROWS[0], "chosen": '[{"fruit": "pear"}]'}])
    spec = SourceSpec("mine", path=str(tmp_path / "text.csv"))
    download(spec, None, folder("raw2"))
    clean(spec, tmp_path / "raw2", folder("clean"))
    chosen = read_table(tmp_path / "clean" / "train.arrow")["chosen"]
    assert [answer[0]["content"] for answer in chosen] == ["A pear.", '[{"fruit": "pear"}]']


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path, folder: Folder) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read as jsonl: .*utf-8"):
        download(SourceSpec("mine", path=str(tmp_path / "a.jsonl")), None, folder("raw"))


def test_missing_paths(tmp_path: Path, folder: Folder) -> None:
    out = folder("raw")
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere"):
        download(SourceSpec("mine", path=str(tmp_path / "nowhere")), None, out)
    with pytest.raises(ValueError, match=r"holds no train file: .*train\.jsonl"):
        download(SourceSpec("mine", path=str(folder("empty"))), None, out)
    two = folder("two")
    for suffix in (".json", ".csv"):
        write_local(two / f"train{suffix}", TEXT_ROWS)
    with pytest.raises(ValueError, match=r"train\.json and train\.csv"):
        download(SourceSpec("mine", path=str(two)), None, out)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Dahoas/rm_static", "Dahoas/rm-static"),
        ("SHP", "stanfordnlp/SHP"),
        ("webgpt", "openai/webgpt_comparisons"),
    ],
)
def test_an_unknown_source_gets_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {hint}"):
        SourceSpec(name)


def test_limits_out_of_range() -> None:
    with pytest.raises(ValueError, match="max_rows of stanfordnlp/SHP is 0"):
        SourceSpec("stanfordnlp/SHP", max_rows=0)
    with pytest.raises(ValueError, match="max_pairs_per_prompt"):
        SourceSpec("stanfordnlp/SHP", max_pairs_per_prompt=0)


def test_check_columns_names_what_is_missing() -> None:
    check_columns("s", ["a", "b", "c"], ["b", "a"])
    with pytest.raises(ValueError, match="lacks the column b; found were a, c"):
        check_columns("s", ["a", "c"], ["a", "b"])


def test_the_mirror_is_copied_as_it_is(demo_hub: Path, tmp_path: Path, folder: Folder) -> None:
    metrics = download(SourceSpec("stanfordnlp/SHP"), str(demo_hub), folder("raw"))
    assert set(metrics["rows"]) == {"train", "validation", "test"}
    copied = tmp_path / "raw" / "validation" / "0000.parquet"
    there = demo_hub / "stanfordnlp" / "SHP" / "data" / "validation-00000-of-00001.parquet"
    assert copied.read_bytes() == there.read_bytes()
    assert metrics["bytes"] == sum(file.stat().st_size for file in (tmp_path / "raw").rglob("*.parquet"))


def test_an_incomplete_mirror(tmp_path: Path, folder: Folder) -> None:
    hub = folder("hub")
    spec = SourceSpec("Dahoas/rm-static")
    with pytest.raises(ValueError, match=r"no folder Dahoas/rm-static: correct data\.hub"):
        download(spec, str(hub), folder("one"))
    data = folder("hub/Dahoas/rm-static/data")
    with pytest.raises(ValueError, match="no Parquet files of the split train"):
        download(spec, str(hub), folder("two"))
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["b"]}), data / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="lacks the columns chosen, rejected; found were prompt, answer"):
        download(spec, str(hub), folder("three"))


def test_the_hub_is_read_at_the_right_revision_and_in_its_conversion_layout(
    tmp_path: Path, folder: Folder, demo_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    table = pq.read_table(demo_hub / "openai" / "webgpt_comparisons" / "data" / "train-00000-of-00001.parquet")
    shards = folder(f"cache/snapshots/{commit}/default/train")
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), shards / "0000.parquet")
    pq.write_table(table.slice(half), shards / "0001.parquet")
    asked = []

    def snapshot(name: str, *, revision: str, **rest: Any) -> str:
        asked.append((name, revision))
        return str(tmp_path / "cache" / "snapshots" / commit)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    name = "openai/webgpt_comparisons"
    metrics = download(SourceSpec(name), None, folder("raw"))
    assert metrics["rows"] == {"train": table.num_rows}
    assert metrics["revision"] == commit
    assert sorted(file.name for file in (tmp_path / "raw" / "train").iterdir()) == ["0000.parquet", "0001.parquet"]
    download(SourceSpec(name, revision="abc"), None, folder("raw2"))
    assert asked == [(name, "refs/convert/parquet"), (name, "abc")]


def answer_of(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example/x"))


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (httpx.ConnectError("no route"), ConnectionError, r"name a mirror folder with data\.hub.*no route"),
        (OSError("offline mode is enabled"), ConnectionError, "offline mode"),
        (GatedRepoError("gated", response=answer_of(401)), ValueError, "is gated: accept its terms .* HF_TOKEN"),
        (RevisionNotFoundError("404", response=answer_of(404)), ValueError, "The hub has no .*revision"),
    ],
)
def test_what_the_hub_refuses(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], sentence: str
) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    with pytest.raises(kind, match=sentence):
        download(SourceSpec("Dahoas/rm-static"), None, folder("raw"))


def test_every_source_reads_its_columns_from_the_real_schema(mirror: Path) -> None:
    for name, source in SOURCES.items():
        for split in (split for splits in source.sides.values() for split in splits):
            file = mirror / name / "data" / f"{split}-00000-of-00001.parquet"
            check_columns(name, pq.read_schema(file).names, source.columns)
