"""Checkpoints from which a run goes on as if it had not stopped.

    checkpoints/step-00000120/   <engine>/... as DeepSpeed writes it, rank-<n>.pt with each rank's random and loop state
    checkpoints/latest.json      the newest whole one: its step, its world size, the digest of every file

DeepSpeed saves no random state and gives rank 0's client state to every rank under ZeRO-2, so each rank writes its own
file. `latest.json` is replaced atomically once every file is on disk; what it does not name is no checkpoint. The files
are pickles, ours alone: their digests are checked before one is read.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from tasks.training.ranks import barrier, rank, world_size
from tasks.training.types import Engine

LATEST = "latest.json"


def save(folder: Path, step: int, engines: Mapping[str, Engine], state: Mapping[str, Any]) -> None:
    """Write the checkpoint of a step and drop older ones. All ranks call it.

    Args:
        folder: the stage's checkpoint folder.
        engines: name -> engine.
        state: what this rank's loop needs besides the engines, picklable.
    """
    target = folder / f"step-{step:08d}"
    if rank() == 0:
        shutil.rmtree(target, ignore_errors=True)  # of a try that died before its latest.json
        target.mkdir(parents=True)
    barrier()
    for name, engine in engines.items():
        engine.save(target / name)
    torch.save({"state": dict(state), "random": _random_state()}, target / f"rank-{rank()}.pt")
    barrier()
    if rank() == 0:
        _point(folder, step, target)
        for old in folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old)
    barrier()


def load(folder: Path, engines: Mapping[str, Engine]) -> tuple[int, dict[str, Any]] | None:
    """Continue the engines and random states from the newest checkpoint.

    Returns: its step and this rank's state, or None where there is no checkpoint. Raises ValueError for a damaged one
    and for one of another number of ranks.
    """
    if not (folder / LATEST).exists():
        return None
    latest = json.loads((folder / LATEST).read_text())
    target = folder / f"step-{latest['step']:08d}"
    if latest["world_size"] != world_size():
        raise ValueError(
            f"the checkpoint at step {latest['step']} was written by {latest['world_size']} processes, this run has "
            f"{world_size()}; run it with as many again, or start the stage afresh with --force"
        )
    damaged = [name for name, digest in latest["files"].items() if not _has_digest(target / name, digest)]
    if damaged:
        raise ValueError(f"the checkpoint {target} is damaged ({damaged[0]}); start the stage afresh with --force")
    barrier()
    for name, engine in engines.items():
        engine.load(target / name)
    own = torch.load(target / f"rank-{rank()}.pt", weights_only=False)
    _set_random_state(own["random"])
    return latest["step"], own["state"]


def _point(folder: Path, step: int, target: Path) -> None:
    files = sorted(path for path in target.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    latest = {
        "step": step,
        "world_size": world_size(),
        "files": {path.relative_to(target).as_posix(): _digest(path) for path in files},
    }
    temporary = folder / f".{LATEST}"
    temporary.write_text(json.dumps(latest))
    _flush(temporary)
    temporary.replace(folder / LATEST)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and _digest(path) == digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
