"""Stages of the worker as ranks of their own, without a launcher: started, watched, killed."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = "tests.integration.programs"
Ranks = list[subprocess.Popen[str]]


def start_ranks(module: str, arguments: Sequence[object], processes: int) -> Ranks:
    """`python -m MODULE ARGUMENTS` as so many ranks of one group, each begun and ended as the flow's are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path} | {k: str(v) for k, v in own.items()}
        argv = [sys.executable, "-m", "infra.rank", module, *map(str, arguments)]
        ranks.append(
            subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        )
    return ranks


def start_stage(
    stage: str,
    directory: Path,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    processes: int,
    device: str = "cpu",
) -> Ranks:
    """The ranks of a stage in `directory`, which may hold a checkpoint."""
    spec = {
        "stage": stage,
        "config": dict(config),
        "inputs": {name: str(path) for name, path in inputs.items()},
        "device": device,
    }
    (directory / "records").mkdir(parents=True, exist_ok=True)
    (directory / "records" / "config.json").write_text(json.dumps(spec))
    return start_ranks("tasks.worker", [stage, directory], processes)


def finish(ranks: Ranks, code: int = 0) -> str:
    """What the first rank printed, when all have ended with this exit code."""
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), outputs[0][-3000:]
    return outputs[0]


def after_step(directory: Path, ranks: Ranks, step: int, number: int) -> None:
    """Send the ranks a signal as soon as the metrics of a step are there: in the midst of the next step."""
    rows = directory / "records" / "metrics.jsonl"
    end = time.monotonic() + 400
    while not (rows.exists() and len(rows.read_text().splitlines()) >= step):
        assert time.monotonic() < end
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0][-3000:]
        time.sleep(0.005)
    for rank in ranks:
        rank.send_signal(number)
