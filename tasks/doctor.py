"""Whether this machine can run: one check per thing that a run needs, each with what to do where it is missing."""

import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from infra import servers
from infra.machine import cores, gpu_count
from tasks.config import SIX_SETS
from tasks.tracking import redacted

LEAST_FREE_GIB = 5.0
SECONDS_TO_ANSWER = 5.0
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    state: Literal["ok", "note", "bad"]
    """ok; note: a run works, but not every run; bad: something is to be done first."""
    text: str


def checks(workspace: Path, hub: Path | None = None) -> list[tuple[str, Callable[[], Finding]]]:
    """Name and check, in the order in which a run needs them. Each check takes at most some seconds.

    Args:
        hub: a mirror folder to check instead of the Hugging Face hub.
    """
    return [
        ("Python", python),
        ("torch", torch),
        ("GPUs", gpus),
        ("DeepSpeed", deepspeed),
        ("Prefect", prefect),
        ("MLflow", partial(mlflow, workspace)),
        ("hub", partial(mirror, hub) if hub is not None else hub_answers),
        ("disk", partial(disk, workspace)),
    ]


def python() -> Finding:
    """The interpreter's version and the cores."""
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("bad", f"{version}; make the environment anew with Python 3.11 or 3.12")
    return Finding("ok", f"{version}, {cores()} cores")


def torch() -> Finding:
    """torch, and whether its build can use the GPUs that are here; asked in a process of its own, as it loads long."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Finding("bad", "not installed; install this project in its environment: `pip install -e .`")
    ask = "import torch; print(torch.version.cuda or '', torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return Finding("bad", f"{version} cannot be imported: {_last_line(answer.stderr)}; install it anew")
    *cuda, seen = answer.stdout.split()
    if gpu_count() and not cuda:
        return Finding("bad", f"{version} is a CPU build and this machine has GPUs; install a CUDA build of torch")
    if gpu_count() and seen == "0":
        return Finding("bad", f"{version} sees none of the GPUs; check the driver and CUDA_VISIBLE_DEVICES")
    return Finding("ok", f"{version}{f', CUDA {cuda[0]}' if cuda else ', CPU build'}")


def gpus() -> Finding:
    """The GPUs that the driver shows."""
    count = gpu_count()
    if not count:
        return Finding("note", "none; runs use `infrastructure: local-cpu`, which suits small models only")
    return Finding("ok", f"{count}; `infrastructure: one-gpu` uses one of them, `two-gpus` two, `one-node` eight")


def deepspeed() -> Finding:
    """DeepSpeed, and whether its compiled optimizer, which offload to CPU memory wants, can be built."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return Finding("bad", "not installed; install this project in its environment: `pip install -e .`")
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None and not _beside_python(name)]
    if missing:
        return Finding(
            "note",
            f"{version}; without {' and '.join(missing)} its compiled ops are not to be had, so offload_optimizer is "
            "not, all else is (Debian: `apt install g++ ninja-build`)",
        )
    return Finding("ok", f"{version}, a compiler for its ops is here")


def prefect() -> Finding:
    """The Prefect API that a run would use."""
    version = metadata.version("prefect")
    url = servers.configured_url()
    if url is None:
        return Finding("ok", f"{version}; a run starts a server of its own, or uses that of `rlhf ui`")
    if servers.healthy(f"{url.rstrip('/')}/health"):
        return Finding("ok", f"{version}, server {url}")
    return Finding("bad", f"{url} does not answer; start that server, correct PREFECT_API_URL, or unset it")


def mlflow(workspace: Path) -> Finding:
    """The MLflow store that a run would use; looking does not make one."""
    version = metadata.version("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri.startswith(("http://", "https://")):
        if servers.healthy(f"{uri.rstrip('/')}/health"):
            return Finding("ok", f"{version}, server {redacted(uri)}")
        return Finding("bad", f"{redacted(uri)} does not answer; start it, correct MLFLOW_TRACKING_URI, or unset it")
    if uri and not uri.startswith("sqlite:"):
        return Finding("note", f"{version}, store {redacted(uri)}, not checked")
    database = Path(uri.removeprefix("sqlite:///")) if uri else workspace / "mlflow.db"
    if not database.exists():
        return Finding("ok", f"{version}; a run makes its store {database}")
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            runs = connection.execute("select count(*) from runs").fetchone()[0]
    except sqlite3.Error as error:
        return Finding("bad", f"{database} cannot be read ({error}); move it away, and the next run makes another")
    return Finding("ok", f"{version}, store {database} with {runs} runs")


def hub_answers() -> Finding:
    """Whether the Hugging Face hub answers."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("note", "HF_HUB_OFFLINE is set; runs read local folders and what was downloaded before")
    address = os.environ.get("HF_ENDPOINT", HUB)
    try:
        with urllib.request.urlopen(f"{address}/api/datasets/{SIX_SETS[0]}", timeout=SECONDS_TO_ANSWER):
            return Finding("ok", f"{address} answers")
    except (OSError, ValueError) as error:
        return Finding(
            "note",
            f"{address} does not answer ({error}); the demo needs none, other runs a mirror folder (data.hub) or a "
            "connection (HF_ENDPOINT, HTTPS_PROXY)",
        )


def mirror(hub: Path) -> Finding:
    """Whether a mirror folder has the six sets."""
    if not hub.is_dir():
        return Finding("bad", f"there is no folder {hub}; correct it")
    missing = [name for name in SIX_SETS if not any((hub / name).rglob("*.parquet"))]
    if missing:
        return Finding("bad", f"{hub} has no Parquet files of {', '.join(missing)}; copy them there, or leave them out")
    return Finding("ok", f"{hub} has all six sets")


def disk(workspace: Path) -> Finding:
    """Free space where the workspace is or will be, and whether it can be written to."""
    folder = workspace.expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("bad", f"{folder} cannot be written to ({error.strerror}); choose another workspace")
    free = shutil.disk_usage(folder).free / 2**30
    if free < LEAST_FREE_GIB:
        return Finding("bad", f"{free:.1f} GiB free at {folder}; make room, or choose another workspace")
    return Finding("ok", f"{free:.0f} GiB free at {folder}")


def _beside_python(name: str) -> bool:
    return (Path(sys.executable).parent / name).exists()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
