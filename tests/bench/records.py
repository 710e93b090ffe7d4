"""Records of benchmarks: one JSON object a line in tests/bench/results/NAME.jsonl, appended and never edited."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "deepspeed")


def record(
    bench: str, case: str, metric: str, value: float, unit: str, baseline: dict[str, Any] | None, gpus: int = 1
) -> None:
    """Append a figure, of so many GPUs.

    `baseline`: `name`, `value` and, if it is no measurement of the same run, `source`.
    """
    row = {
        "bench": bench,
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "hardware": hardware() if gpus == 1 else f"{gpus} x {hardware()}",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    append(f"{bench}.jsonl", row)


def append(name: str, row: dict[str, Any]) -> None:
    """Append a line to a file of results."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    with (results / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def last(bench: str, case: str) -> float | None:
    """The value recorded last for a case; None if there is none."""
    path = HERE / "results" / f"{bench}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((row["value"] for row in reversed(rows) if row["case"] == case), None)


def hardware() -> str:
    """The GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def commit() -> str | None:
    """The commit that is checked out (RLHF_COMMIT says it for a copy without its repository); None if nothing does."""
    if given := os.environ.get("RLHF_COMMIT"):
        return given
    told = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    return told.stdout.strip() or None
