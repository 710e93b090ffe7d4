"""The registry: versions of models, their tags, and the aliases that say which serves."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from tasks.tracking.store import Store, connect, first_line, lock_file

CANDIDATE = "candidate"
CHAMPION = "champion"
PREVIOUS = "previous"
LONGEST_DESCRIPTION = 5000
"""Of MLflow's column."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    tags: dict[str, str]
    source: str
    run_id: str | None
    created: float
    """Seconds since 1970."""

    @property
    def digest(self) -> str | None:
        """Digest of the stage that made the model: its identity."""
        return self.tags.get("digest")


def register_version(
    store: Store,
    name: str,
    folder: Path,
    run_id: str | None,
    tags: Mapping[str, str],
    description: str | None = None,
) -> int:
    """Register a model folder under a name. Returns the version.

    A version whose tag `digest` is that of `tags` is not registered again. On a local store the folder is registered
    where it lies, so it has to stay; on a server it is uploaded as a file of the run `run_id`.
    """
    from mlflow.exceptions import MlflowException

    assert "digest" in tags, "a version needs its digest, or it is registered again and again"
    client = connect(store.uri)
    with registry_lock(store):
        for known in versions(store, name):
            if known.digest == tags["digest"]:
                return known.version
        if store.is_local:
            source = folder.resolve().as_uri()
        else:
            assert run_id is not None, "a model is uploaded as a file of a run"
            client.log_artifacts(run_id, str(folder), folder.name)
            source = f"runs:/{run_id}/{folder.name}"
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = client.create_model_version(
            name, source, run_id, tags={key: str(value) for key, value in tags.items()}, description=description
        )
    return int(made.version)


def fetch_version(store: Store, version: Version, folder: Path) -> dict[str, Any]:
    """Copy a registered model's files into `folder`. Returns their count. Raises ValueError where they are gone."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        # `models:/` would ask the registry of this process's default store, whatever store is given.
        uri = connect(store.uri).get_model_version_download_uri(version.name, str(version.version))
        fetched = Path(download_artifacts(uri, dst_path=str(folder), tracking_uri=store.uri))
    except (MlflowException, OSError) as error:
        raise ValueError(f"its files could not be fetched from {version.source} ({first_line(error)})") from None
    if not (fetched / "model" / "config.json").is_file():
        raise ValueError(f"{version.source} holds no model folder")
    if fetched != folder:  # a folder of that name inside
        for part in fetched.iterdir():
            part.rename(folder / part.name)
        fetched.rmdir()
    return {"files": sum(file.is_file() for file in folder.rglob("*"))}


def read_file(store: Store, version: Version, name: str) -> str | None:
    """The text of a file of a registered model, wherever the model lies; None where there is no such file."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    address = urlsplit(version.source)
    try:
        if address.scheme == "file":
            return (Path(unquote(address.path)) / name).read_text()
        uri = connect(store.uri).get_model_version_download_uri(version.name, str(version.version))
        with tempfile.TemporaryDirectory() as folder:
            return Path(download_artifacts(f"{uri}/{name}", dst_path=folder, tracking_uri=store.uri)).read_text()
    except (MlflowException, OSError):
        return None


def named_version(store: Store, name: str) -> Version:
    """The version that a user means by `models:/NAME@ALIAS`, `models:/NAME/VERSION`, either without `models:/`, or NAME
    alone (its champion, else its newest). Raises ValueError that names what there is."""
    model, at, wanted = name.removeprefix("models:/").partition("@")
    number = ""
    if not at:
        model, _, number = model.partition("/")
    known = versions(store, model)
    if not known:
        names = ", ".join(registered_names(store)) or "none yet; `rlhf run` registers the first"
        raise ValueError(f"There is no registered model {model}; registered: {names}.")
    if number:
        if not number.isdigit():
            raise ValueError(f"{name}: write a version as models:/{model}/3 or models:/{model}@{CHAMPION}.")
        return find_version(store, model, int(number))
    for version in known:
        if (wanted or CHAMPION) in version.aliases:
            return version
    if at:
        aliases = sorted({alias for version in known for alias in version.aliases})
        raise ValueError(f"{model} has no alias {wanted}; it has {', '.join(aliases) or 'none'}.")
    return known[0]


def registered_names(store: Store) -> list[str]:
    """The names of all registered models, sorted."""
    return sorted(model.name for model in _pages(connect(store.uri).search_registered_models))


def versions(store: Store, name: str) -> list[Version]:
    """The versions of a registered model, the newest first; none if there is no such model."""
    aliases = _aliases(store, name)
    if aliases is None:
        return []
    found = _pages(connect(store.uri).search_model_versions, filter_string=f"name = '{name}'")
    return sorted((_version(entry, aliases) for entry in found), key=lambda version: -version.version)


def alias(store: Store, name: str, alias: str) -> Version | None:
    """The version that an alias of a registered model points at, if any."""
    return next((version for version in versions(store, name) if alias in version.aliases), None)


def set_alias(store: Store, name: str, alias: str, version: int | None) -> None:
    """Point an alias at a version; None takes it away, if there is one. Writes only what changes."""
    held = (_aliases(store, name) or {}).get(alias)
    if version is None and held is not None:
        connect(store.uri).delete_registered_model_alias(name, alias)
    elif version is not None and held != str(version):
        connect(store.uri).set_registered_model_alias(name, alias, str(version))


def model_tags(store: Store, name: str) -> dict[str, str]:
    """The tags of a registered model, which all its versions share."""
    return dict(connect(store.uri).get_registered_model(name).tags)


def tag_model(store: Store, name: str, tags: Mapping[str, str]) -> None:
    """Tag a registered model."""
    client = connect(store.uri)
    for key, value in tags.items():
        client.set_registered_model_tag(name, key, value)


def tag_version(store: Store, name: str, version: int, tags: Mapping[str, str]) -> None:
    """Tag a version of a registered model."""
    client = connect(store.uri)
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, value)


def add_to_description(store: Store, name: str, version: int, title: str, text: str) -> None:
    """Put a text under a title at the end of a version's description, in place of what stood there."""
    client = connect(store.uri)
    before, _, _ = (client.get_model_version(name, str(version)).description or "").partition(f"\n\n{title}\n")
    client.update_model_version(name, str(version), f"{before}\n\n{title}\n{text}"[:LONGEST_DESCRIPTION])


def delete_version(store: Store, version: Version) -> None:
    """Take a version out of the registry. Raises ValueError if an alias points at it meanwhile."""
    with registry_lock(store):
        if aliases := find_version(store, version.name, version.version).aliases:
            raise ValueError(f"{version.name} version {version.version} is {', '.join(aliases)} now, so it stays")
        connect(store.uri).delete_model_version(version.name, str(version.version))


def find_version(store: Store, name: str, version: int) -> Version:
    """A version of a registered model. Raises ValueError that names what exists."""
    known = versions(store, name)
    if not known:
        names = ", ".join(registered_names(store)) or "none yet; `rlhf run` registers the first"
        raise ValueError(f"There is no registered model {name}; registered: {names}.")
    for entry in known:
        if entry.version == version:
            return entry
    numbers = ", ".join(str(entry.version) for entry in reversed(known))
    raise ValueError(f"{name} has no version {version}; it has {numbers}.")


@contextmanager
def registry_lock(store: Store) -> Iterator[None]:
    """Held (`with`) while several registry calls have to happen as one; holds off other processes on this machine."""
    # A server gives no lock: those who share the workspace at least hold each other off.
    file = lock_file(store.uri) if store.is_local else Path(store.workspace) / ".registry.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    # One lock object per process and file, so that a caller that holds the lock may call what takes it too.
    with FileLock(file, is_singleton=True):
        yield


def _aliases(store: Store, name: str) -> dict[str, str] | None:
    """Alias -> version of a registered model; None if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        found = connect(store.uri).get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return {alias: str(version) for alias, version in found.items()}


def _version(entry: Any, aliases: Mapping[str, str]) -> Version:
    own = tuple(sorted(name for name, number in aliases.items() if number == str(entry.version)))
    created = (entry.creation_timestamp or 0) / 1000
    return Version(entry.name, int(entry.version), own, dict(entry.tags), entry.source, entry.run_id or None, created)


def _pages(search: Any, **arguments: Any) -> Iterable[Any]:
    """All results of one of MLflow's paged searches."""
    page = search(**arguments)
    yield from page
    while page.token:
        page = search(page_token=page.token, **arguments)
        yield from page
