"""Local files (JSON, JSONL, CSV, Parquet) as Arrow tables, whatever their form, with clear errors.

Text is a string, or a list of messages with role and content; in a CSV file a list is written as JSON.
"""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_LIST = re.compile(r"\s*\[\s*[{\]]")
_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"'](?:role|content)[\"']")


def read_local(path: Path) -> dict[str, pa.Table]:
    """The tables of a file ({"train": ...}) or of a folder's train.* and test.* files, by split.

    ValueError where the path or the folder's train file is missing, or a file cannot be read as what its name says.
    """
    if path.is_file():
        return {"train": read_file(path)}
    if not path.is_dir():
        raise ValueError(f"There is no file or folder {path}: correct the source's path.")
    files = {split: _one_file(path, split) for split in ("train", "test")}
    if files["train"] is None:
        raise ValueError(f"The folder {path} holds no train file: it needs one of {_names('train')}.")
    return {split: read_file(file) for split, file in files.items() if file}


def _names(split: str) -> str:
    return ", ".join(split + suffix for suffix in SUFFIXES)


def _one_file(folder: Path, split: str) -> Path | None:
    files = [folder / (split + suffix) for suffix in SUFFIXES if (folder / (split + suffix)).is_file()]
    if len(files) > 1:
        raise ValueError(f"The folder {folder} holds {files[0].name} and {files[1].name}: leave one {split} file.")
    return files[0] if files else None


def read_file(path: Path) -> pa.Table:
    """One file as a table; ValueError where its suffix is unknown or its content is not what the suffix says."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"The file {path} is none of {', '.join(SUFFIXES)}: convert it to one of them.")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        if path.suffix == ".csv":
            return _read_csv(path)
        return pa.Table.from_pylist(_json_rows(path.read_text(encoding="utf-8-sig")))
    except (
        pa.ArrowException,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # whatever its reader says of bad content
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"The file {path} cannot be read as {path.suffix[1:]}: {reason}") from error


def _json_rows(text: str) -> list[Any]:
    """A JSON array of objects, or an object a line (the name .json is in use for both)."""
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig") as file:
        header = pyarrow.csv.open_csv(path).schema.names if file.read(1) else []
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
        ),
    )
    return pa.table({name: _messages_if_json(name, table[name]) for name in table.column_names})


def _messages_if_json(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """A column whose cells all are lists of objects, or empty, as lists, null where it is empty; else as it is.

    ValueError where only some of the cells are messages.  (Another list may be a text: an answer in JSON.)
    """
    texts = column.to_pylist()
    filled = [text for text in texts if text.strip()]
    if filled and all(map(_LIST.match, filled)):
        return pa.array([json.loads(text) if text.strip() else None for text in texts])
    if any(map(_MESSAGES.match, filled)):
        raise ValueError(f"the column {name} holds messages in some cells and plain text in others: write all one way.")
    return column


def list_of(cell: Any) -> list[Any]:
    """The list that a cell holds, itself or as JSON; ValueError for anything else."""
    value = json.loads(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list):
        raise ValueError(f"a cell holds {cell!r}, not a list")
    return value


def check_cells(path: str, table: pa.Table, columns: tuple[str, ...]) -> None:
    """ValueError where a column holds neither text nor messages."""
    for name in columns:
        kind = table.schema.field(name).type
        if not (_is_text(kind) or _is_messages(kind)):
            raise ValueError(
                f"The column {name} of {path} holds {kind}; it has to hold text or lists of messages (role, content)."
            )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _is_messages(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return {"role", "content"} <= fields.keys() and _is_text(fields["role"]) and _is_text(fields["content"])
