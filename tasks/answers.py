"""PPO's answers along its way as a table, while it runs: what `samples.jsonl` holds, as text.

Read in the flow's process, which loads neither torch nor transformers for it: the tokens are turned to text by the
tokenizer's own file.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tasks.training.samples import SAMPLES

SHOWN = 8
"""Answers of a pool in the table."""


class Answers:
    """The answers in a PPO stage's directory; `model` is a model folder with its tokenizer."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.path, self.tokenizer_file = directory / SAMPLES, model / "tokenizer.json"
        self.seen = self.path.stat().st_size if self.path.exists() else 0

    def fresh(self) -> list[dict[str, Any]]:
        """The whole table, if a pool has come since the last look; else nothing."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self.seen or not self.tokenizer_file.exists():
            return []
        self.seen = size
        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half written
        pools: dict[int, list[dict[str, Any]]] = {}
        for row in map(json.loads, lines):
            pools.setdefault(row["step"], []).append(row)
        return [
            {
                "pool": row["step"],
                "prompt": tokenizer.decode(row["prompt"], skip_special_tokens=False),
                "answer": tokenizer.decode(row["answer"], skip_special_tokens=False),
                "reward": round(row["reward"], 3),
                "kl": round(row["kl"], 3),
            }
            for rows in pools.values()
            for row in rows[:SHOWN]
        ]
