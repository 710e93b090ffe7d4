"""Clears a workspace: which stage directories nothing needs any more, and their removal.

Needed is what a registered version was made from (its lineage record), where it lies itself, what it was measured by
(the gold reward model and verdicts that were paid for too), the fetched copy (`champion/`) of what has an alias, as an
endpoint may serve it, and what a crashed run of a deployment, which starts again by itself, has come to
(`tasks.unfinished`). Everything else is either work that was never registered, an unfinished stage with its
checkpoints, or another copy, which can be fetched again. While a run is going on, or a command reads from the
workspace, nothing is removed: it may be about to read what looks unused.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks import lineage, tracking, unfinished
from tasks.dag import STAGES
from tasks.registered import copied
from tasks.stages import MANIFEST, named, read_manifest
from tasks.tracking import Store, Version

FOLDERS = (*STAGES, "compare", "data-report", "champion", "register")
"""Of a workspace: those that hold stage directories."""
LOCK = ".runs.lock"


@dataclass(frozen=True)
class Removal:
    """A stage directory that may go."""

    directory: Path
    why: str
    size: int
    """Bytes that its removal gives back: files that another directory links to stay."""


@dataclass(frozen=True)
class Plan:
    """What a workspace could be rid of."""

    versions: list[Version]
    """Registered versions beyond those to keep."""
    removals: list[Removal]
    spared: int = 0
    """Stage directories that stay for runs alone that have not come to their end."""
    keep: int | None = None
    """As `plan` was told."""

    @property
    def size(self) -> int:
        return sum(removal.size for removal in self.removals)


def plan(store: Store, keep: int | None = None) -> Plan:
    """What could go. Changes nothing.

    Args:
        keep: versions of each model that stay, the newest, beside all that have an alias; None: every version.

    Raises ValueError where a version that stays keeps no lineage record: what it needs is then not known.
    """
    every = [version for name in tracking.registered_names(store) for version in tracking.versions(store, name)]
    dropped = [] if keep is None else list(_beyond(store, keep))
    numbers = {(version.name, version.version) for version in dropped}
    kept = [version for version in every if (version.name, version.version) not in numbers]
    workspace = Path(store.workspace)
    needed = _needed(store, kept)
    candidates = [folder for stage in FOLDERS for folder in sorted((workspace / stage).glob("*/"))]
    unregistered = [folder for folder in candidates if folder.resolve() not in needed]
    going_on = unfinished.needed(workspace)
    unused = [folder for folder in unregistered if folder.resolve() not in going_on]
    gone = {(stat.st_dev, stat.st_ino): stat.st_nlink for folder in unused for stat in _stats(folder)}
    links: dict[tuple[int, int], int] = {}
    removals = []
    for folder in unused:
        size = 0
        for stat in _stats(folder):
            place = (stat.st_dev, stat.st_ino)
            links[place] = links.get(place, 0) + 1
            if links[place] == gone[place]:  # the last name of the file
                size += stat.st_size
        removals.append(Removal(folder, _why(folder), size))
    return Plan(dropped, removals, len(unregistered) - len(unused), keep)


def carry_out(store: Store, planned: Plan) -> list[Removal]:
    """Remove what was planned, the registered versions first: none of them is ever without its files.

    What a run that began since the plan has come to need stays. Returns what is gone. Raises ValueError while a run is
    going on in the workspace, or a command reads from it.
    """
    with _unused(Path(store.workspace)):
        unused = {removal.directory for removal in plan(store, planned.keep).removals}
        removals = [removal for removal in planned.removals if removal.directory in unused]
        for version in planned.versions:
            tracking.delete_version(store, version)
        for removal in removals:
            # Renamed first, so that a half-removed directory is never taken for a stage.
            trash = removal.directory.with_name(f".removed-{removal.directory.name}")
            removal.directory.rename(trash)
            shutil.rmtree(trash)
            removal.directory.with_name(f".{removal.directory.name}.lock").unlink(missing_ok=True)
    return removals


@contextmanager
def in_use(workspace: Path) -> Iterator[None]:
    """Held by a run, and by a command while it reads models or data, so that nothing is removed under them; any number
    may hold it, and a dead process does not. Who may only read the workspace goes without where the file is not there.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    path = workspace / LOCK
    with suppress(OSError):
        path.touch()
    if not path.exists():
        yield
        return
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _unused(workspace: Path) -> Iterator[None]:
    with (workspace / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"a run is going on in {workspace}, or a command reads from it; prune it when that has ended"
            ) from None
        yield


def _beyond(store: Store, keep: int) -> Iterator[Version]:
    for name in tracking.registered_names(store):
        without_alias = [version for version in tracking.versions(store, name)[keep:] if not version.aliases]
        yield from without_alias


def _needed(store: Store, versions: Iterable[Version]) -> set[Path]:
    """The directories that versions lie in, were made from or were measured by."""
    workspace = Path(store.workspace)
    needed, models, registered = set(), set(), set()
    for version in versions:
        record = lineage.of_version(store, version)
        needed |= {(workspace / step).resolve() for step in record["steps"]}
        models.add((workspace / record["root"]).resolve())
        if version.aliases:
            needed.add(copied(version, workspace).directory.resolve())
        address = urlsplit(version.source)
        if address.scheme == "file":
            registered.add(Path(unquote(address.path)).parent)
    # Also where the files are a server's, or an evaluation came later: else the next run has something new to do.
    folders = (workspace / "register").glob("*/")
    registered |= {folder for folder in folders if _inputs(folder, workspace).get("policy") in models}
    seen: set[Path] = set()
    for folder in registered:
        _add_with_inputs(folder, workspace, seen)
    needed |= seen
    return needed | {
        folder.resolve()
        for folder in (workspace / "verdicts").glob("*/")
        if (read := _inputs(folder, workspace)) and needed.issuperset(read.values())
    }


def _add_with_inputs(directory: Path, workspace: Path, seen: set[Path]) -> None:
    """Add the stage directory and all that it was made from."""
    directory = directory.resolve()
    if directory not in seen:
        seen.add(directory)
        for read in _inputs(directory, workspace).values():
            _add_with_inputs(read, workspace, seen)


def _inputs(directory: Path, workspace: Path) -> dict[str, Path]:
    """Role -> the stage directory that a stage was made from; none where its manifest is gone."""
    read = (read_manifest(directory) or {"inputs": {}})["inputs"].items()
    return {role: named(workspace, stage["stage"], stage["fingerprint"]).resolve() for role, stage in read}


def _why(folder: Path) -> str:
    if folder.parent.name == "champion":
        return "a copy of a registered model"
    return "nothing registered needs it" if (folder / MANIFEST).exists() else "was not finished"


def _stats(folder: Path) -> Iterator[os.stat_result]:
    return (path.stat() for path in folder.rglob("*") if path.is_file())
