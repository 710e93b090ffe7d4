"""A trace of a few steps, by torch.profiler: which kernels ran, when, and what waited for what.

`records/trace.json.gz` opens in https://ui.perfetto.dev and chrome://tracing, `records/trace.txt` is the table of what
took longest. The first step, which compiles and allocates, is left out. The flow's process takes the files' names from
here, so torch is loaded late.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.profiler import profile

TRACE, TABLE = "trace.json.gz", "trace.txt"
STEPS = 2
"""That are traced, after one that is not and one in which the profiler warms up."""
LINES = 40


@contextmanager
def profiled(records: Path, device: "torch.device") -> Iterator[Callable[[], None]]:
    """Watches what is done inside; to be called after every step."""
    from torch.profiler import ProfilerActivity, profile, schedule

    gpu = device.type == "cuda"

    def write(profiler: "profile") -> None:
        profiler.export_chrome_trace(str(records / TRACE))
        by = "self_device_time_total" if gpu else "self_cpu_time_total"
        (records / TABLE).write_text(profiler.key_averages().table(sort_by=by, row_limit=LINES))

    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])],
        schedule=schedule(wait=1, warmup=1, active=STEPS, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield profiler.step
