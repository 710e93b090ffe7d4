"""What `profile: true` leaves of a stage."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from tasks import profiling


@pytest.mark.parametrize("steps", [4, 3])
def test_the_trace_holds_the_steps_after_the_first_two(tmp_path: Path, steps: int) -> None:
    with profiling.profiled(tmp_path, torch.device("cpu")) as end_of_step:
        for step in range(steps):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            end_of_step()
    with gzip.open(tmp_path / profiling.TRACE, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {name for name in names if str(name).startswith("step ")} == {f"step {n}" for n in range(2, steps)}
    assert "aten::mm" in (tmp_path / profiling.TABLE).read_text()
