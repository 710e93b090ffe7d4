"""The launched process: `python -m tasks.worker STAGE DIRECTORY` trains or evaluates one stage, as one rank.

It reads `records/config.json`, runs the stage's module, and leaves beside the outputs
    records/metrics.jsonl   what was measured, a row per step
    records/report.json     the stage's metrics, written last; then the exit code is 0
    records/outcome.json    otherwise: why it ended, and what to do; the exit code is 75 after a requested stop
and prints, for `records/worker.log`, when its parts began and ended: where a stage's time goes.
Prefect is never imported here. Stages are dispatched by a table of names, so that a stage's code digest does not hold
every other stage's code.
"""

import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep import trained
from infra.launch import STOPPED, report_metrics, report_progress
from tasks.json_lines import cut_back
from tasks.profiling import profiled
from tasks.stages import RECORDS, checkpoint_step, write_json
from tasks.training.job import Job, NotFiniteError, Stopped

MODULES = {
    "base": "tasks.base",
    "sft": "tasks.training.sft",
    "reward": "tasks.training.reward",
    "gold": "tasks.training.reward",
    "ppo": "tasks.training.ppo",
    "evaluate": "tasks.evaluate",
    "compare": "tasks.evaluate",
}
TRAINED = ("sft", "reward", "gold", "ppo")
MODELS = ("base", "sft", "reward", "gold", "ppo", "candidate", "champion")
"""Inputs that are models: the stages get the Hugging Face folder inside."""
SECONDS_BETWEEN_PROGRESS = 0.5
LOG = logging.getLogger("tasks.worker")


def main() -> None:
    stage, directory = sys.argv[1], Path(sys.argv[2])
    stop = StopRequest()
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s")
    logging.getLogger("tasks").setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    LOG.info("%s: loads its code", stage)
    try:
        report = run(stage, directory, stop)
    except Stopped as stopped:
        leave(directory, "stopped", str(stopped), resumes_at=stopped.step)
        raise SystemExit(STOPPED) from None
    except ValueError as error:
        traceback.print_exc()
        leave(directory, "user", str(error))
        raise SystemExit(2) from None
    except NotFiniteError as error:
        leave(directory, "nan", str(error))
        raise SystemExit(1) from None
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        leave(directory, "oom", f"{out_of_memory(stage)} ({str(error).splitlines()[0]})")
        raise SystemExit(1) from None
    except Exception as error:
        traceback.print_exc()
        leave(directory, "bug", f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    if is_first_rank():
        write_json(directory / RECORDS / "report.json", report)


def run(stage: str, directory: Path, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Run a stage in this process. Returns its metrics."""
    spec = json.loads((directory / RECORDS / "config.json").read_text())
    with left_out("mlflow", "sklearn"):
        module = importlib.import_module(MODULES[stage])
        device = start(spec["device"], distributed=stage in TRAINED)
    LOG.info("%s: begins on %s", stage, device)
    section = spec["config"].get(stage, {})
    if section.get("deterministic", False):
        add_in_one_order()
    rows = MetricRows(directory)
    wanted = is_first_rank() and section.get("profile", False)
    watched = profiled(directory / RECORDS, device) if wanted else nullcontext(lambda: None)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        if is_first_rank():
            metrics = {**metrics, **memory(device)}
            rows.append(step, metrics)
            report_metrics({"step": step, "metrics": metrics})
        end_of_step()

    job = Job(
        stage=stage,
        directory=directory,
        config=spec["config"],
        inputs=model_inputs(spec["inputs"]),
        device=device,
        log=log,
        progress=Progress(),
        should_stop=should_stop,
    )
    with watched as end_of_step:
        report: dict[str, Any] = module.run(job)
    if stage in TRAINED and is_first_rank():
        keep_ancestry(job)
    LOG.info("%s: done", stage)
    return {**report, **held(device)}


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Inside, packages count as not installed: DeepSpeed and transformers take in some that no stage uses, which is a
    quarter of the time that a worker takes to begin. Afterwards the code of a model may import them."""
    absent: dict[str, Any] = {name: None for name in packages if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def start(device: str, distributed: bool) -> torch.device:
    """This process's device; with `distributed` also its process group and DeepSpeed."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this run wants a GPU, but torch sees none here; use `infrastructure: local-cpu`")
    if distributed:
        from tasks.training import engine

        return engine.start(device)
    return torch.device(device)


def add_in_one_order() -> None:
    """Kernels that give the same bits each time, for all that this process computes from here on.

    Memory that nothing was written to is left so: no step reads it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first product
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def model_inputs(inputs: Mapping[str, str]) -> dict[str, Path]:
    """Stage directories -> what the stage reads: models become their folders, `tokenizer` is that of base or SFT."""
    paths = {name: Path(path) for name, path in inputs.items()}
    folders = {name: model_folder(path) if name in MODELS else path for name, path in paths.items()}
    if "ppo" in paths and (paths["ppo"] / "ema").is_dir():
        folders["ema"] = paths["ppo"] / "ema"
    for name in ("base", "sft"):
        if name in paths:
            own = paths[name] / "tokenizer"
            folders.setdefault("tokenizer", own if own.is_dir() else folders[name])
    return folders


def model_folder(directory: Path) -> Path:
    """The Hugging Face folder of a stage: `model/`, or what base.json points at, or the directory itself."""
    pointer = directory / "base.json"
    if pointer.exists():
        return Path(json.loads(pointer.read_text())["model"])
    return directory / "model" if (directory / "model").is_dir() else directory


def keep_ancestry(job: Job) -> None:
    """Leave in the stage's models what they and those that they come from were trained on."""
    ancestors = [job.inputs[role] for role in MODELS if role in job.inputs]
    own = np.load(job.inputs["split"] / f"{job.phase}-keys.npy")
    for name in ("model", "ema"):
        if (job.directory / name).is_dir():
            trained.keep(job.directory / name, ancestors, own)


def leave(directory: Path, kind: str, message: str, resumes_at: int | None = None) -> None:
    """Write why this process ended, unless another rank has: the first to fail is the cause."""
    outcome = directory / RECORDS / "outcome.json"
    if not outcome.exists():
        write_json(outcome, {"kind": kind, "message": message, "resumes_at": resumes_at})


def out_of_memory(stage: str) -> str:
    """What to change when a stage runs out of GPU memory."""
    engine = f"{stage}.policy_engine" if stage == "ppo" else f"{stage}.engine"
    size = f"{stage}.micro_batch_size" if stage == "ppo" else f"{stage}.micro_batch_tokens"
    return (
        f"{stage} ran out of GPU memory; lower {size}, set {engine}.gradient_checkpointing: true, "
        f"or raise {engine}.zero_stage"
    )


def memory(device: torch.device) -> dict[str, float]:
    """Peak GPU memory of this rank in GiB; nothing on a CPU."""
    return {"memory/peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {}


def held(device: torch.device) -> dict[str, float]:
    """What the stage took of GPUs: how many, and its peak on this rank's in GiB; nothing on a CPU."""
    measured = {name.removeprefix("memory/"): value for name, value in memory(device).items()}
    return {**measured, "gpus": int(os.environ.get("WORLD_SIZE", "1"))} if measured else {}


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


class StopRequest:
    """True once SIGTERM or SIGINT has come: the loop then ends its step, writes a checkpoint and stops."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


class MetricRows:
    """`records/metrics.jsonl`; rows of steps that a resumed run makes again are dropped at its first one.

    Not before: only when the stage has loaded its checkpoint is it known which one was undamaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / RECORDS / "metrics.jsonl"
        self.cut = False

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.cut:
            cut_back(self.path, checkpoint_step(self.directory) or 0)
        self.cut = True
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class Progress:
    """Tells the flow how far this stage is, at most every half second."""

    def __init__(self) -> None:
        self.told = 0.0

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if is_first_rank() and (now - self.told >= SECONDS_BETWEEN_PROGRESS or step == total):
            self.told = now
            report_progress({"step": step, "total": total, "metrics": dict(metrics)})


if __name__ == "__main__":
    main()
