"""Unsupervised text, cut into chunks of equal length: what PPO's language-model loss (PTX) is taken over.

Ouyang et al. 2022, section 3.5 (equation 2, the term in gamma).  Documents are tokenised without the chat template,
joined with EOS after each, and cut every `chunk` tokens; the rest that fills no chunk is left out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from data_prep.keys import fraction
from data_prep.kinds import check_columns
from data_prep.local_files import SUFFIXES, read_file
from data_prep.sources import mirror_folder, snapshot, split_files
from data_prep.tables import table_writer
from data_prep.tokenizer import encode, holds_special, load_tokenizer

SIDES = ("train", "eval")
CHUNK_SCHEMA = pa.schema([("tokens", pa.list_(pa.int32()))])
BATCH = 64


@dataclass(frozen=True)
class TextSpec:
    """Where the text is.

    name: of a set on the hub (or in a mirror); subset: the folder of its files there, if it has several sets in one.
    path: a local .txt, JSON, JSONL, CSV or Parquet file instead, or a folder of them.  column: the one with the text.
    train, test: splits of the hub's set; without a test split some documents are held out.
    """

    name: str
    subset: str | None = None
    path: str | None = None
    revision: str | None = None
    column: str = "text"
    train: str = "train"
    test: str | None = None


def download_text(spec: TextSpec, hub: str | None, out: Path, commit: str | None = None) -> dict[str, Any]:
    """Bring the text into `out` as {train, eval}/NNNN.parquet with the column `text`.

    Returns and raises what `data_prep.sources.download` does.
    """
    if spec.path is not None:
        tables, revision = {"train": _local(spec, Path(spec.path))}, "local"
    else:
        patterns = [f"{spec.subset}/*.parquet" if spec.subset else "*.parquet"]
        found = snapshot(spec.name, spec.revision or "main", patterns, commit) if hub is None else None
        root, revision = found or (mirror_folder(spec.name, Path(hub or "")), "local")
        splits = {"train": spec.train} | ({"eval": spec.test} if spec.test else {})
        tables = {side: _parquet(spec, root, split) for side, split in splits.items()}
    rows = {}
    for side, parts in tables.items():
        (out / side).mkdir()
        rows[side] = 0
        for number, table in enumerate(parts):
            pq.write_table(table, out / side / f"{number:04d}.parquet")
            rows[side] += table.num_rows
    size = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    return {"rows": rows, "bytes": size, "revision": revision}


def _parquet(spec: TextSpec, root: Path, split: str) -> Iterator[pa.Table]:
    folder = root / spec.subset if spec.subset and (root / spec.subset).is_dir() else root
    files = split_files(folder, split)
    if not files:
        raise ValueError(
            f"{spec.name} in {folder} has no Parquet files of the split {split}: correct the split's name."
        )
    return (_text(spec, file, pq.read_table(file)) for file in files)


def _local(spec: TextSpec, path: Path) -> Iterator[pa.Table]:
    files = sorted(file for file in path.iterdir() if file.suffix in (".txt", *SUFFIXES)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"There is no text at {path}: correct data.unsupervised.path.")
    return (_text(spec, file, _lines(file) if file.suffix == ".txt" else read_file(file)) for file in files)


def _lines(file: Path) -> pa.Table:
    """A text file's lines, with their ends, as rows."""
    try:
        return pa.table({"text": file.read_text(encoding="utf-8-sig").splitlines(keepends=True)})
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {file} is no UTF-8 text: {error}.") from error


def _text(spec: TextSpec, file: Path, table: pa.Table) -> pa.Table:
    column = "text" if file.suffix == ".txt" else spec.column
    check_columns(f"{spec.name} ({file.name})", table.column_names, [column])
    return pa.table({"text": table[column].cast(pa.string())})


def chunk(
    raw: Path,
    tokenizer_dir: Path,
    size: int,
    document_start: str | None,
    eval_fraction: float,
    out: Path,
    trusted: bool = False,
) -> dict[str, Any]:
    """Write ptx-train.arrow and ptx-eval.arrow (`CHUNK_SCHEMA`), `size` tokens a row, from the texts in `raw`.

    document_start: see `documents`.  eval_fraction: of the documents, by their hash, where `raw` has no eval texts.
    trusted: whether code that the tokenizer brings may run.
    Returns {side: {"documents", "chunks", "drops", "tokens"}}; drops: special_token (a text spells one out), empty, and
    the tokens left_over.  ValueError where the texts of a side fill no chunk.
    """
    tokenizer = load_tokenizer(tokenizer_dir, trusted)
    own = (raw / "eval").is_dir()
    counts = {}
    for side in SIDES:
        texts = documents(_rows(raw / (side if own else "train")), document_start)
        if not own:
            texts = (text for text in texts if (fraction("text", text) < eval_fraction) == (side == "eval"))
        counts[side] = _write_chunks(texts, tokenizer, size, out / f"ptx-{side}.arrow")
    for side, which, mend in (("train", "", ""), ("eval", "held-out ", ", or raise data.eval_fraction")):
        if not counts[side]["chunks"]:
            raise ValueError(
                f"The {which}unsupervised text fills no chunk of {size} tokens: add text, or lower "
                f"data.unsupervised.chunk_tokens{mend}."
            )
    return counts


def _rows(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches():
            yield from (text for text in batch["text"].to_pylist() if text is not None)


def documents(rows: Iterable[str], start: str | None) -> Iterator[str]:
    """The documents in rows of text: each row is one, or, with `start`, one begins at each row that it matches.

    WikiText has a line a row, and an article begins at ` = Title = `.
    """
    if start is None:
        yield from rows
        return
    begins = re.compile(start)
    document: list[str] = []
    for row in rows:
        if begins.match(row) and document:
            yield "".join(document)
            document = []
        document.append(row)
    if document:
        yield "".join(document)


def _write_chunks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int, path: Path) -> dict[str, Any]:
    drops: Counter[str] = Counter()
    waiting: list[int] = []
    kept = 0
    with table_writer(path, CHUNK_SCHEMA) as writer:
        for batch in _batches(_good(texts, tokenizer, drops)):
            for ids in encode(tokenizer, batch):
                kept += 1
                waiting += [*ids, tokenizer.eos_token_id]
                whole = len(waiting) - len(waiting) % size
                for begin in range(0, whole, size):
                    writer.append({"tokens": waiting[begin : begin + size]})
                del waiting[:whole]
    tokens = writer.rows * size
    return {"documents": kept, "chunks": writer.rows, "tokens": tokens, "left_over": len(waiting), "drops": dict(drops)}


def _good(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, drops: Counter[str]) -> Iterator[str]:
    for text in texts:
        reason = "empty" if not text.strip() else "special_token" if holds_special(tokenizer, [text]) else None
        if reason:
            drops[reason] += 1
        else:
            yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
