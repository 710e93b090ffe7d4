"""Accuracy of a reward model on a set's own test rows, scored by transformers alone.

    python tests/bench/reward_accuracy.py MODEL [MODEL ...] --workspace FOLDER [--source Dahoas/rm-static] [--record]

MODEL is the folder of a reward model of one run, one folder for each seed, and the workspace is that of the run. All
test rows that cleaning keeps count, however long they are, with their weights left aside; a row whose prompt the run
has among its train rows ends the bench. Beside the accuracy stand its 95 % interval (Wilson), that of the longer
answer, and over several models the mean.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForSequenceClassification

from data_prep.keys import prompt_group
from data_prep.tables import iter_rows
from data_prep.tokenizer import answer_ids, load_tokenizer, prompt_ids
from tasks.training.batches import chunks, right_padded
from tasks.training.reward import wilson
from tests.bench.records import record

ROWS = 32
"""Pairs that are scored at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--source", default="Dahoas/rm-static")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    rows = test_rows(options.workspace, options.source)
    found = []
    for folder in options.models:
        accuracy, longer = measured(folder, rows)
        low, high = wilson(accuracy, len(rows))
        print(f"{folder}: {accuracy:.4f} [{low:.4f}, {high:.4f}] of {len(rows)} pairs; longer answer {longer:.4f}")
        found.append(accuracy)
    mean = sum(found) / len(found)
    print(f"mean of {len(found)}: {mean:.4f}")
    if options.record:
        beside = {"name": "longer answer", "value": longer}
        record("reward", f"{options.source} test rows, {len(found)} seeds", "accuracy", mean, "of pairs", beside)


def test_rows(workspace: Path, source: str) -> list[dict[str, Any]]:
    """The set's own test rows as cleaned for the workspace's last run. SystemExit if one's prompt was trained on."""
    cleaned = [
        path for path in manifests(workspace, "clean") if json.loads(path.read_text())["config"]["source"] == source
    ]
    split = manifests(workspace, "split")[-1].parent
    trained = {
        prompt_group(row["prompt"]) for path in split.glob("*-train.arrow") for row in iter_rows(path, ["prompt"])
    }
    rows = list(iter_rows(cleaned[-1].parent / "test.arrow"))
    if leaked := sum(prompt_group(row["prompt"]) in trained for row in rows):
        raise SystemExit(f"{leaked} of {len(rows)} test rows have a prompt that the run was trained on")
    return rows


def manifests(workspace: Path, stage: str) -> list[Path]:
    """Those of a stage, the newest last."""
    return sorted(workspace.glob(f"{stage}/*/manifest.json"), key=lambda path: path.stat().st_mtime)


@torch.no_grad()
def measured(folder: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy of a model and of taking the longer answer, ties half."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    hits = longer = 0.0
    for part in chunks(rows, ROWS):
        ids = [sequence for row in part for sequence in both(tokenizer, row)]
        batch = right_padded(ids, tokenizer.pad_token_id, device)
        states = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        last = batch.attention_mask.sum(1) - 1
        scores = model.score(states[torch.arange(len(ids), device=device), last]).squeeze(-1)
        hits += sum(preferences(scores.tolist()))
        longer += sum(preferences([len(sequence) for sequence in ids]))
    return hits / len(rows), longer / len(rows)


def both(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of prompt and chosen, and of prompt and rejected answer."""
    prompt = prompt_ids(tokenizer, row["prompt"])
    chosen, rejected = (answer_ids(tokenizer, row["prompt"], row[side][-1]) for side in ("chosen", "rejected"))
    return prompt + chosen, prompt + rejected


def preferences(values: list[float]) -> Iterator[float]:
    """1 where the first of two is the larger, 0 where the second is, one half for a tie."""
    for first, second in zip(values[::2], values[1::2], strict=True):
        yield 0.5 if first == second else float(first > second)


if __name__ == "__main__":
    main()
