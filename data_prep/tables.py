"""Reading and writing the tables that steps hand to each other: one Arrow IPC stream file each, memory-mapped.

The same rows always give the same bytes (fixed batch size, no compression, no timestamps), so a file's digest names its
content.  A file appears under its name only when it is complete.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

BATCH_ROWS = 1024

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PAIR_SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("source", pa.string()),
        ("group", pa.string()),
        ("weight", pa.float32()),
    ]
)

Row = Mapping[str, Any]


class TableWriter:
    """Collects rows and writes them as record batches of exactly BATCH_ROWS rows (the last one may be shorter)."""

    def __init__(self, sink: Any, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows = 0
        self._stream = pa.ipc.new_stream(sink, schema)
        self._waiting: list[Row] = []

    def append(self, row: Row) -> None:
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._stream.write_batch(pa.RecordBatch.from_pylist(self._waiting, schema=self.schema))
        self._waiting = []

    def close(self) -> None:
        if self._waiting or not self.rows:  # an empty table still holds one empty batch, for readers that want one
            self._flush()
        self._stream.close()


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[TableWriter]:
    """A writer of the table `path`; the file takes its name when the block ends well, and is removed otherwise."""
    half_written = path.with_name(path.name + ".part")
    try:
        with pa.OSFile(str(half_written), "wb") as sink:
            writer = TableWriter(sink, schema)
            yield writer
            writer.close()
        os.replace(half_written, path)
    finally:
        half_written.unlink(missing_ok=True)


def write_table(rows: Iterable[Row] | pa.Table, path: Path, schema: pa.Schema | None = None) -> int:
    """Write rows (mappings by column, or an Arrow table) to `path`; returns how many.

    `schema` is needed for mappings; a table brings its own.
    """
    if isinstance(rows, pa.Table):
        schema = rows.schema
        rows = (row for batch in rows.to_batches(BATCH_ROWS) for row in batch.to_pylist())
    assert schema is not None, "rows without a table need a schema"
    with table_writer(path, schema) as writer:
        for row in rows:
            writer.append(row)
    return writer.rows


def read_table(path: Path) -> datasets.Dataset:
    """The table as a memory-mapped `datasets.Dataset`; FileNotFoundError where there is none."""
    return datasets.Dataset.from_file(str(path))


def read_arrow(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The table as a memory-mapped Arrow table, only `columns` of it where given."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
    return table.select(columns) if columns else table


def count_rows(path: Path) -> int:
    """The rows of a table, without reading them."""
    with pa.memory_map(str(path)) as source:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(source))


def iter_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table one by one, a record batch in memory at a time."""
    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            yield from (batch.select(columns) if columns else batch).to_pylist()
