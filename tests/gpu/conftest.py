"""Each GPU test's outcome is kept by commit, one line in tests/bench/results/gpu.jsonl."""

from datetime import UTC, datetime

import pytest
import torch

from tests.bench.records import append, commit, hardware, versions


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    ran = report.when == "call" or (report.when == "setup" and report.failed)
    if ran and "tests/gpu/" in report.nodeid and torch.cuda.is_available():
        row = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append("gpu.jsonl", row)
