"""A copy of a workspace's finished stages at an address of fsspec: an object store, for machines that share no disk.

    s3://bucket/runs/<stage>/<fingerprint>/...   as in the workspace; manifest.json last, so one without it is none
    s3://bucket/runs/ledger.parquet              the split ledger, as it was after the last split

Stages are made in the workspace, a folder, and copied when they are done; where a machine lacks a stage that the remote
has, it is fetched. An object store knows no locks: runs on several machines follow each other (the concurrency limit of
a deployment sees to that), and checkpoints stay on the machine that wrote them. No stage is ever deleted here.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.config import ConfigError

MANIFEST = "manifest.json"
Intact = Callable[[Path], bool]


class RemoteError(ConnectionError):
    """The remote gave no answer, or refused."""


def check(address: str) -> None:
    """Whether the remote can be written, before there is work to lose: ConfigError or RemoteError if not."""
    with _opened(address) as (files, root):
        bucket = root.partition("/")[0]  # nothing where paths begin with a slash
        if bucket and not files.exists(bucket):
            raise FileNotFoundError(f"there is no {bucket}; create it")
        files.makedirs(root, exist_ok=True)
        files.pipe_file(f"{root}/.writable", b"")


def fetch(address: str, directory: Path, intact: Intact) -> bool:
    """Whether the remote has a stage that this machine lacks; it is then in `directory`, whole, as `intact` judges.

    What an unfinished try left in `directory` is deleted. A copy that is damaged loses its manifest and is none: the
    stage is made anew, and copied over it.
    """
    with _opened(address) as (files, root):
        place = _place(root, directory)
        try:
            manifest: bytes = files.cat_file(f"{place}/{MANIFEST}")
        except FileNotFoundError:
            return False
        part = directory.with_name(f".{directory.name}.fetched")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in _names(manifest):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                files.get_file(f"{place}/{name}", str(part / name))
            except FileNotFoundError:
                break
        (part / MANIFEST).write_bytes(manifest)
        if not intact(part):
            shutil.rmtree(part)
            files.rm_file(f"{place}/{MANIFEST}")
            return False
    shutil.rmtree(directory, ignore_errors=True)
    part.rename(directory)
    return True


def store(address: str, directory: Path) -> None:
    """Copy a finished stage to the remote, unless it is there."""
    manifest = (directory / MANIFEST).read_bytes()
    with _opened(address) as (files, root):
        place = _place(root, directory)
        try:
            if files.cat_file(f"{place}/{MANIFEST}") == manifest:
                return
            files.rm_file(f"{place}/{MANIFEST}")  # of another making of this stage, whose files are now replaced
        except FileNotFoundError:
            pass
        for name in [*_names(manifest), MANIFEST]:
            _put(files, directory / name, f"{place}/{name}")


def fetch_file(address: str, file: Path) -> bytes | None:
    """What the remote has as a file of the workspace; None if it has none."""
    with _opened(address) as (files, root):
        try:
            found: bytes = files.cat_file(f"{root}/{file.name}")
        except FileNotFoundError:
            return None
    return found


def store_file(address: str, file: Path) -> None:
    """Copy a file of the workspace to the remote."""
    with _opened(address) as (files, root):
        _put(files, file, f"{root}/{file.name}")


def _put(files: Any, file: Path, place: str) -> None:
    files.makedirs(place.rpartition("/")[0], exist_ok=True)
    files.put_file(str(file), place)


def _place(root: str, directory: Path) -> str:
    return f"{root}/{directory.parent.name}/{directory.name}"


def _names(manifest: bytes) -> list[str]:
    names = sorted(json.loads(manifest)["files"])
    if out := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"a manifest names {out[0]}, which leads out of its stage")
    return names


@contextmanager
def _opened(address: str) -> Iterator[tuple[Any, str]]:
    """The filesystem of an address and the path in it; what goes wrong inside is a RemoteError that names the address.

    Each filesystem has errors of its own, which is why all are caught.
    """
    import fsspec  # its import takes a tenth of a second, which runs without a remote save

    try:
        files, root = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"remote: {address} cannot be opened: {error}") from None
    try:
        yield files, root.rstrip("/")
    except Exception as error:
        raise RemoteError(
            f"the remote {address} failed ({type(error).__name__}: {error}); what is finished is in the workspace, run "
            "again when it answers, or leave out remote"
        ) from error
