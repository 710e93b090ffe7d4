"""Tables that people read too: JSON Lines, UTF-8, a row a line.

A line ends at a newline alone. `str.splitlines` would end it at U+2028 or U+0085 as well, which texts hold and JSON
leaves as they are.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of steps after this one, which a resumed stage makes again, and one that a kill cut short."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")
        path.write_text("".join(f"{line}\n" for line in lines if _step(line) <= step), encoding="utf-8")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
