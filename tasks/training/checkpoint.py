"""Checkpoints from which a run goes on as if it had not stopped.

    checkpoints/step-00000120/   <engine>/... as DeepSpeed writes it, rank-<n>.pt with each rank's random and loop state
    checkpoints/step-00000120/whole.json   its step and the best one, its world size, every file's digest: written last
    checkpoints/latest.json      the newest one

DeepSpeed saves no random state and gives rank 0's client state to every rank under ZeRO-2, so each rank writes its own
file. `whole.json` comes by an atomic rename once every file is on disk, and goes before the first of them does: a
folder without it is no checkpoint. Where the newest is damaged, the one before it serves. The files are pickles, ours
alone: their digests are checked before one is read.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch

from tasks.training.ranks import barrier, rank, world_size
from tasks.training.types import Engine

LATEST = "latest.json"
WHOLE = "whole.json"
LOG = logging.getLogger(__name__)


def save(
    folder: Path,
    step: int,
    engines: Mapping[str, Engine],
    state: Mapping[str, Any],
    keep: int = 1,
    best: int | None = None,
) -> None:
    """Write the checkpoint of a step and drop all but the last ones. All ranks call it.

    Args:
        folder: the stage's checkpoint folder.
        engines: name -> engine.
        state: what this rank's loop needs besides the engines, picklable.
        keep: so many whole checkpoints stay, this one among them.
        best: the step whose checkpoint stays as long as this one does; None: none.
    """
    began = time.perf_counter()
    torch.serialization.set_crc32_options(False)  # about a second for 4 GB, and the digests tell more
    target = _of_step(folder, step)
    if rank() == 0:
        _drop(target)  # of a try that died in the midst of it
        target.mkdir(parents=True)
    barrier()
    for name, engine in engines.items():
        engine.save(target / name)
    torch.save({"state": dict(state), "random": _random_state()}, target / f"rank-{rank()}.pt")
    barrier()
    if rank() == 0:
        _seal(step, target, best)
        _write(folder / LATEST, {"step": step})
        kept = _whole(folder, step)[:keep]
        kept += [_of_step(folder, sealed["best"]) for sealed in map(_sealed, kept) if sealed["best"]]
        for old in folder.glob("step-*"):
            if old not in kept:
                _drop(old)
    barrier()
    LOG.info("checkpoint of step %d written in %.1f s", step, time.perf_counter() - began)


def load(folder: Path, engines: Mapping[str, Engine], step: int | None = None) -> tuple[int, dict[str, Any]] | None:
    """Continue the engines and random states from the newest checkpoint that is undamaged, or from that of a step.

    Returns: its step and this rank's state, or None where there is no checkpoint. Raises ValueError where all are
    damaged, or that of the step is, and for one of another number of ranks.
    """
    if not (folder / LATEST).exists():
        return None
    for target in _whole(folder, json.loads((folder / LATEST).read_text())["step"]):
        if step is not None and target != _of_step(folder, step):
            continue
        sealed = _sealed(target)
        if sealed["world_size"] != world_size():
            raise ValueError(
                f"the checkpoint at step {sealed['step']} was written by {sealed['world_size']} processes, this run "
                f"has {world_size()}; run it with as many again, or start the stage afresh with --force"
            )
        damaged = [name for name, digest in sealed["files"].items() if not _has_digest(target / name, digest)]
        barrier()  # all ranks have looked
        if not damaged:
            if rank() == 0 and step is None:
                _write(folder / LATEST, {"step": sealed["step"]})
            for name, engine in engines.items():
                engine.load(target / name)
            own = torch.load(target / f"rank-{rank()}.pt", weights_only=False)
            _set_random_state(own["random"])
            LOG.info("the checkpoint of step %d is loaded", sealed["step"])
            return sealed["step"], own["state"]
        if rank() == 0:
            print(f"the checkpoint {target} is damaged ({damaged[0]}); the one before it is taken", file=sys.stderr)
            _drop(target)
        barrier()
    raise ValueError(f"no checkpoint in {folder} is undamaged; start the stage afresh with --force")


def _whole(folder: Path, newest: int) -> list[Path]:
    """The whole checkpoints up to a step, the newest first."""
    found = sorted((path.parent for path in folder.glob(f"step-*/{WHOLE}")), reverse=True)
    return [path for path in found if path <= _of_step(folder, newest)]


def _of_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _sealed(target: Path) -> dict[str, Any]:
    """What the seal of a whole checkpoint says."""
    sealed: dict[str, Any] = json.loads((target / WHOLE).read_text())
    return sealed


def _drop(target: Path) -> None:
    """Delete a checkpoint; cut short at any moment, it leaves none that looks whole."""
    (target / WHOLE).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)


def _seal(step: int, target: Path, best: int | None) -> None:
    files = sorted(path for path in target.rglob("*") if path.is_file())
    names = [path.relative_to(target).as_posix() for path in files]
    with ThreadPoolExecutor() as side_by_side:  # gigabytes, and hashing leaves other threads the interpreter
        digests = dict(zip(names, side_by_side.map(_digest_on_disk, files), strict=True))
    _write(target / WHOLE, {"step": step, "world_size": world_size(), "best": best, "files": digests})


def _write(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value))
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _digest_on_disk(path: Path) -> str:
    _flush(path)
    return _digest(path)


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
