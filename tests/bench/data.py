"""Data preparation at the six sets' full size: time, memory, rows; and tokenising against a plain loop.

    python tests/bench/data.py HUB [--scale 1.0] [--tokenizer FOLDER] [--record]

HUB is a folder in the hub's layout with some real rows of each set. They are varied to the sets' sizes (a tenth of the
words replaced by others of the same set, so that copies are neither equal nor near-duplicates) and go through the steps
of the flow: download, clean, blend (near-duplicates included), split, tokenise. Without --tokenizer a byte-level BPE of
49,152 tokens is trained on the rows.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.blend import blend
from data_prep.clean import clean
from data_prep.sources import SOURCES, SourceSpec, download
from data_prep.splits import split
from data_prep.tables import iter_rows
from data_prep.tokenise import tokenise
from data_prep.tokenizer import load_tokenizer
from data_prep.workers import apart, cores, over_cores

FULL = {
    "Dahoas/rm-static": 81_000,
    "Dahoas/full-hh-rlhf": 124_000,
    "Dahoas/synthetic-instruct-gptj-pairwise": 33_000,
    "yitingxie/rlhf-reward-datasets": 81_000,
    "openai/webgpt_comparisons": 20_000,
    "stanfordnlp/SHP": 386_000,
}
"""Rows of each set, all splits."""
COPIED = {"yitingxie/rlhf-reward-datasets": "Dahoas/rm-static"}
"""Sets that hold another's rows: their variants are the same, as the real ones are."""
PHASES, EVAL_FRACTION, LIMITS = (2, 4, 3, 1), 0.05, (512, 512)
CHANGED = 0.1
MARKERS = {"Human:", "Assistant:"}
PLAIN_ROWS = 4000


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_varied(options.hub, root / "hub", options.scale)
        tokenizer = options.tokenizer or train_tokenizer(root / "hub", root / "tokenizer")
        with memory() as peak:
            lines, metrics = prepare(root, tokenizer)
        lines.append(("tokenise", *against_plain_loop(root, tokenizer)))
        seconds = sum(line[1] for line in lines[:-1])
        figures = {
            ("full", "seconds"): (seconds, "s"),
            ("full", "peak_gib"): (peak() / 2**30, "GiB"),
            ("full", "survival"): (survival(metrics), "share"),
            **{("full", f"rows_per_s {step}"): (rows / spent, "rows/s") for step, spent, rows in lines[:-1]},
            ("tokenise", "speedup"): (lines[-1][1], "times"),
            ("tokenise", "bytes_ratio"): (lines[-1][2], "times fewer"),
        }
    for (case, metric), (value, unit) in figures.items():
        print(f"{case:<10}{metric:<24}{value:>14,.2f} {unit}")
    print(json.dumps({"blend": {name: metrics["blend"][name] for name in ("train", "test", "leak", "leaked_tests")}}))
    if options.record:
        from tests.bench.records import record

        baseline = {"name": "row at a time, padded to full length", "value": 1.0}
        case = "full" if options.scale == 1 else f"scale {options.scale}"
        for (name, metric), (value, unit) in figures.items():
            own = name == "tokenise"
            record("data", name if own else case, metric, value, unit, baseline if own else None)


def prepare(root: Path, tokenizer: Path) -> tuple[list[tuple[str, float, int]], dict[str, Any]]:
    """The steps of the flow. Returns (step, seconds, rows in) of each, and their metrics."""
    lines: list[tuple[str, float, int]] = []
    metrics: dict[str, Any] = {}

    def timed(step: str, work: Callable[[], Any], rows: Callable[[Any], int]) -> Any:
        started = time.perf_counter()
        metrics[step] = work()
        lines.append((step, time.perf_counter() - started, rows(metrics[step])))
        print(f"{step}: {lines[-1][1]:.1f} s", flush=True)

    specs = {name: SourceSpec(name) for name in SOURCES}
    raw, cleaned = ({name: _made(root / step / name) for name in SOURCES} for step in ("raw", "clean"))
    timed(
        "download",
        lambda: [download(specs[name], str(root / "hub"), raw[name]) for name in SOURCES],
        lambda made: sum(sum(one["rows"].values()) for one in made),
    )
    largest_first = sorted(FULL, key=lambda name: -FULL[name])
    with ThreadPoolExecutor(cores()) as threads:
        timed(
            "clean",
            lambda: list(threads.map(lambda name: apart(clean, specs[name], raw[name], cleaned[name]), largest_first)),
            lambda made: sum(one["total"]["rows_in"] for one in made),
        )
    kept = sum(one["total"]["kept"] for one in metrics["clean"])
    with over_cores() as mapped:
        timed("blend", lambda: blend(cleaned, {}, 0, _made(root / "blend"), mapped), lambda made: kept)
        rows = metrics["blend"]["train"] + metrics["blend"]["test"]
        settings = PHASES, EVAL_FRACTION, 0, _made(root / "split"), root / "ledger.parquet"
        timed("split", lambda: split(root / "blend", *settings, mapped), lambda made: rows)
        out = _made(root / "tokens")
        timed("tokenise", lambda: tokenise(root / "split", tokenizer, *LIMITS, out, mapped), lambda made: rows)
    return lines, metrics


def against_plain_loop(root: Path, tokenizer_folder: Path) -> tuple[float, float]:
    """How many times faster our tokenising is than a row at a time with padding to full length, and smaller."""
    rows = []
    for row in iter_rows(root / "split" / "reward-train.arrow"):
        rows.append(row)
        if len(rows) == PLAIN_ROWS:
            break
    from data_prep.tables import PAIR_SCHEMA, write_table

    cut, ours = _made(root / "cut"), _made(root / "ours")
    for side in ("train", "eval"):
        write_table(rows, cut / f"reward-{side}.arrow", PAIR_SCHEMA)
    started = time.perf_counter()
    tokenise(cut, tokenizer_folder, *LIMITS, ours)
    seconds = (time.perf_counter() - started) / 2  # it did both sides
    started = time.perf_counter()
    size = _plain_loop(rows, tokenizer_folder)
    return (time.perf_counter() - started) / seconds, size / (ours / "reward-train.arrow").stat().st_size


def _plain_loop(rows: list[dict[str, Any]], tokenizer_folder: Path) -> int:
    """What DeepSpeed-Chat does: each answer with its prompt, one by one, int64 ids and mask padded to full length.

    Returns the bytes of the tensors.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    length = sum(LIMITS)
    size = 0
    for row in rows:
        for answer in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template([*row["prompt"], *row[answer]], tokenize=False)
            ids = tokenizer(text, max_length=length, padding="max_length", truncation=True, return_tensors="np")
            size += ids["input_ids"].astype(np.int64).nbytes + ids["attention_mask"].astype(np.int64).nbytes
    return size


def survival(metrics: Mapping[str, Any]) -> float:
    """Share of the rows that pass their source's own filters and are no exact copies that near-duplicates leave."""
    drops = [side["drops"] for source in metrics["blend"]["sources"].values() for side in source.values()]
    near = sum(drop.get("near_duplicate", 0) + drop.get("contradicted", 0) for drop in drops)
    kept = metrics["blend"]["train"] + metrics["blend"]["test"]
    return kept / (kept + near)


def write_varied(hub: Path, out: Path, scale: float) -> None:
    """Write the sets in the hub's layout, each with its share of rows in its splits, made from the rows of `hub`."""
    for name, rows in FULL.items():
        files = sorted((hub / name).rglob("*.parquet"))
        tables = {file.relative_to(hub): pq.read_table(file) for file in files}
        there = sum(table.num_rows for table in tables.values())
        vocabulary = sorted({word for table in tables.values() for word in _words(table) if word not in MARKERS})
        for path, table in tables.items():
            wanted = round(scale * rows * table.num_rows / there)
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            seed = str(path).replace(name, COPIED.get(name, name))
            _write_variants(table, wanted, vocabulary, random.Random(seed), out / path)


def _write_variants(table: pa.Table, wanted: int, vocabulary: list[str], draw: random.Random, path: Path) -> None:
    rows = table.to_pylist()
    with pq.ParquetWriter(path, table.schema) as writer:
        for begin in range(0, wanted, 10_000):
            numbers = range(begin, min(begin + 10_000, wanted))
            made = [_variant(rows[n % len(rows)], n // len(rows), vocabulary, draw) for n in numbers]
            writer.write_table(pa.Table.from_pylist(made, schema=table.schema))


def _variant(row: dict[str, Any], copy: int, vocabulary: list[str], draw: random.Random) -> dict[str, Any]:
    """The row as it is, or a copy of it with other words; copies of one post keep together."""
    if not copy:
        return row
    post = random.Random(f"{row.get('post_id', draw.random())} {copy}")  # a post's text is the same in all its pairs

    def changed(value: Any, chance: random.Random) -> Any:
        if isinstance(value, dict):
            return {key: changed(part, chance) for key, part in value.items()}
        if not isinstance(value, str) or " " not in value:
            return value
        words = value.split(" ")
        for place, word in enumerate(words):
            if word.isalpha() and word not in MARKERS and chance.random() < CHANGED:
                words[place] = vocabulary[chance.randrange(len(vocabulary))]
        return " ".join(words)

    varied = {key: changed(value, post if key == "history" else draw) for key, value in row.items()}
    if "post_id" in row:
        varied["post_id"] = f"{row['post_id']}-{copy}"
    return varied


def _words(table: pa.Table) -> Iterator[str]:
    for column in table.columns:
        if pa.types.is_string(column.type):
            for text in column.to_pylist()[:500]:
                yield from (word for word in (text or "").split() if word.isalpha())


def train_tokenizer(hub: Path, out: Path) -> Path:
    """A byte-level BPE with the vocabulary of a real model, trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=49_152, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    tables = (pq.read_table(file).slice(0, 5000) for file in sorted(hub.rglob("*.parquet")))
    made.train_from_iterator((" ".join(_words(table)) for table in tables), trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>").save_pretrained(out)
    return out


@contextmanager
def memory() -> Iterator[Callable[[], int]]:
    """Gives a function that says the most bytes that this process and those below it held at once, shared ones once."""
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.5):
            own = psutil.Process()
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            most = max(most, total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        ended.set()
        thread.join()


def _made(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hub", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
