"""Stage directories: the hand-over between steps, and the only cache.

A step reads directories and writes one, `<workspace>/<stage>/<fingerprint>/`. Its manifest.json is written last, by an
atomic rename, so a directory with a manifest is whole and one without is work in progress (a training stage resumes in
it, any other starts it afresh). The fingerprint says what a stage *would* compute: its config, its inputs and its code.
The digest says what it *did* compute: readers take the digest for the identity of their input, since a forced rerun on
a GPU writes other bytes under the same fingerprint.

Three kinds of files lie in a stage directory: outputs, which the digest covers; `records/` (config, log, curves), which
the manifest lists but the digest leaves out; `checkpoints/`, which are gone once the stage is done.
"""

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks import remote

MANIFEST = remote.MANIFEST
RECORDS = "records"
CHECKPOINTS = "checkpoints"
REPO = Path(__file__).resolve().parent.parent
_PARSING = threading.Lock()  # CPython 3.11 raises SystemError when two threads parse at once (gh-106905)
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "pyarrow", "mlflow", "prefect")


@dataclass(frozen=True)
class StageRef:
    """A finished stage: small and JSON-able, so that it can pass between Prefect tasks."""

    stage: str
    fingerprint: str
    digest: str
    path: str
    cached: bool
    seconds: float
    metrics: dict[str, Any]

    @property
    def directory(self) -> Path:
        return Path(self.path)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Stage:
    """A stage that is about to be looked up or made."""

    name: str
    workspace: Path
    config: Mapping[str, Any]
    inputs: Mapping[str, StageRef]
    roots: tuple[str, ...]
    remote: str | None = None
    """Where finished stages are copied to and fetched from: see `tasks.remote`."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over what decides the result: config, the inputs' digests and the code."""
        identity = {
            "stage": self.name,
            "config": self.config,
            "inputs": {name: ref.digest for name, ref in self.inputs.items()},
            "code": code_digest(self.roots),
        }
        return _digest(json.dumps(identity, sort_keys=True).encode())[:16]

    @property
    def directory(self) -> Path:
        return self.workspace / self.name / self.fingerprint


def named(workspace: Path, stage: str, fingerprint: str) -> Path:
    """The directory of the stage that a record names: a registered model's tags, a manifest.

    Raises ValueError for what no stage is called: it could lead out of the workspace.
    """
    if not re.fullmatch("[a-z-]+", stage) or not re.fullmatch("[0-9a-f]{16}", fingerprint):
        raise ValueError(f"{stage}/{fingerprint} names no stage: the record that names it was damaged or forged")
    return workspace / stage / fingerprint


def finished(stage: Stage) -> StageRef | None:
    """The stage's reference if its manifest is there and every file in it still has its digest, else None.

    A stage that lies in the remote alone is fetched, unless another process is making it here.
    """
    if (done := _here(stage)) is not None or stage.remote is None:
        return done
    stage.directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(Timeout), _lock_of(stage.directory).acquire(timeout=0):
        return _fetched(stage)
    return None


def run(
    stage: Stage,
    work: Callable[[Path], Mapping[str, Any]],
    *,
    force: bool = False,
    resumable: bool = False,
    made_by: Mapping[str, str] | None = None,
    on_wait: Callable[[str], None] = print,
) -> StageRef:
    """The finished stage: as it lies there, or made by `work(directory)`, which returns the stage's metrics.

    `made_by` goes into the manifest: the run that makes it, for those who ask later.

    Only one process at a time makes a stage; others wait for it and then find it done. What an interrupted try left
    behind is deleted first, unless the stage is `resumable` and was not finished before; `force` always starts afresh.
    """
    directory = stage.directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory, on_wait):
        if not force and (done := _here(stage)):
            _copied(stage, on_wait)
            return done
        if not force and (done := _fetched(stage)):
            return done
        if directory.exists() and (force or not resumable or (directory / MANIFEST).exists()):
            shutil.rmtree(directory)
        (directory / RECORDS).mkdir(parents=True, exist_ok=True)
        started = time.time()
        metrics = work(directory)
        made = _commit(stage, directory, metrics, started, made_by or {})
        _copied(stage, on_wait)
        return made


def _here(stage: Stage) -> StageRef | None:
    manifest = _intact(stage.directory)
    return _reference(stage.directory, manifest, cached=True) if manifest else None


def _fetched(stage: Stage) -> StageRef | None:
    if stage.remote is None or not remote.fetch(stage.remote, stage.directory, lambda copy: _intact(copy) is not None):
        return None
    manifest = read_manifest(stage.directory)
    assert manifest is not None, "what was fetched is whole"
    return _reference(stage.directory, manifest, cached=True)


def _copied(stage: Stage, on_wait: Callable[[str], None]) -> None:
    """Into the remote. Where that fails the run goes on: the next one copies what is lacking."""
    if stage.remote is not None:
        try:
            remote.store(stage.remote, stage.directory)
        except remote.RemoteError as error:
            on_wait(str(error))


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a stage directory, or None where there is none or it is damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def checkpoint_step(directory: Path) -> int | None:
    """The step of the newest checkpoint in a stage directory, None where there is none (or a damaged pointer)."""
    try:
        return int(json.loads((directory / CHECKPOINTS / "latest.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None


def code_digest(roots: Sequence[str]) -> str:
    """Digest of the project modules that `roots` import, directly or not, without their comments and docstrings.

    The closure stays inside the code that computes (`data_prep`, `tasks.training`) and the roots themselves: how a
    stage is configured, stored and tracked does not change its result. Computed once: what this process has loaded does
    not follow an edit.
    """
    with _PARSING:
        return _code_digest(tuple(roots))


@cache
def _code_digest(roots: tuple[str, ...]) -> str:
    sources = {module: _source(module) for module in _closure(roots)}
    return _digest(json.dumps(sources, sort_keys=True).encode())


def file_digests(directory: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> sha256 and size in bytes of every file below a directory."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        path.relative_to(directory).as_posix(): {"sha256": _file_digest(path), "bytes": path.stat().st_size}
        for path in files
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: until then it stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _commit(
    stage: Stage, directory: Path, metrics: Mapping[str, Any], started: float, made_by: Mapping[str, str]
) -> StageRef:
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    files = file_digests(directory)
    manifest = {
        "stage": stage.name,
        "fingerprint": stage.fingerprint,
        "digest": _outputs_digest(files),
        "inputs": {
            name: {"stage": ref.stage, "fingerprint": ref.fingerprint, "digest": ref.digest}
            for name, ref in stage.inputs.items()
        },
        "config": dict(stage.config),
        "code": {"digest": code_digest(stage.roots), **_commit_of_the_repo()},
        "versions": _versions(),
        "made_by": dict(made_by),
        "metrics": dict(metrics),
        "files": files,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 2),
    }
    write_json(directory / MANIFEST, manifest)
    return _reference(directory, manifest, cached=False)


def _reference(directory: Path, manifest: Mapping[str, Any], cached: bool) -> StageRef:
    return StageRef(
        stage=manifest["stage"],
        fingerprint=manifest["fingerprint"],
        digest=manifest["digest"],
        path=str(directory),
        cached=cached,
        seconds=manifest["seconds"],
        metrics=manifest["metrics"],
    )


def _intact(directory: Path) -> dict[str, Any] | None:
    """The manifest of a stage directory whose files all have the digests that it names, else None."""
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    files = manifest["files"]
    try:
        whole = all(
            (directory / name).stat().st_size == entry["bytes"] and _file_digest(directory / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except OSError:
        return None
    return manifest if whole and manifest["digest"] == _outputs_digest(files) else None


def _lock_of(directory: Path) -> FileLock:
    return FileLock(directory.parent / f".{directory.name}.lock")


@contextmanager
def _locked(directory: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """A lock beside the directory, which the system gives back when its holder dies."""
    lock = _lock_of(directory)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait(f"waiting for another run that is making {directory.parent.name}/{directory.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _closure(roots: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        waiting += [name for name in _imports(module) if name.startswith(("data_prep.", "tasks.training."))]
    return sorted(seen)


@cache
def _imports(module: str) -> set[str]:
    """The project modules that a module names in its import statements, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_module_file(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if _module_file(name).is_file()}


def _module_file(module: str) -> Path:
    return REPO / Path(*module.split(".")).with_suffix(".py")


@cache
def _source(module: str) -> str:
    """A module's source as the compiler sees it: no comments, no layout, no docstrings."""
    tree = ast.parse(_module_file(module).read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _outputs_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    outputs = {name: entry["sha256"] for name, entry in files.items() if not name.startswith(f"{RECORDS}/")}
    return _digest(json.dumps(outputs, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    installed = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {"python": platform.python_version(), **installed}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit_of_the_repo() -> dict[str, Any]:
    """The git commit of the code and whether it was changed since; empty where there is no git."""
    try:
        git = ["git", "--no-optional-locks", "-C", str(REPO)]  # a run is in no way of a commit by hand
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "dirty": bool(changed.strip())}
