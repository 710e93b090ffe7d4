"""MLflow: the runs that show what happened, and the registry that says which model serves.

A flow run is one MLflow run, each of its stages a run nested in it; stage directories stay the one truth, so nothing
here is read back to decide what has to be computed. The worker's rank 0 logs through a `Tracker`; all else runs in the
flow's process. Only this module and `tasks.mlmodel` import mlflow, and only inside functions: the import takes seconds.

    store = open_store(workspace)
    parent = start_run(store, config, tags)
    run = stage_run(store, parent, "sft", directory)    # its worker logs with Tracker(store.uri, run)
    finish_stage(store, run, ref, datasets)             # or link_cached(store, parent, ref) if it was done
    version = register_version(store, "chat-policy", folder, parent, tags)
    end_run(store, parent, "FINISHED")
"""

import getpass
import json
import logging
import math
import os
import queue
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from filelock import FileLock

from tasks.config import SECRET, RunConfig
from tasks.stages import RECORDS, StageRef, read_manifest, write_json

EXPERIMENT = "rlhf-flows"
CANDIDATE = "candidate"
CHAMPION = "champion"
PREVIOUS = "previous"
RUN_FILE = "mlflow.json"
LONGEST_VALUE = 500
LONGEST_DESCRIPTION = 5000
"""Of MLflow's column."""
SECONDS_BETWEEN_FLUSHES = 2.0
SECONDS_TO_CLOSE = 15.0  # a stopping worker has 20 s
WAITING_METRICS = 200_000  # beyond so many a dead server's metrics are let go; metrics.jsonl has them


@dataclass(frozen=True)
class Store:
    """Where runs and models are recorded."""

    uri: str
    workspace: str
    artifacts: str | None
    """Folder of the runs' files; None: a server decides."""
    experiment: str
    experiment_id: str

    @property
    def is_local(self) -> bool:
        """A SQLite file on this machine: models are registered where they lie instead of being uploaded."""
        return self.uri.startswith("sqlite:")


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


@dataclass(frozen=True)
class Source:
    """A preference set as a run used it."""

    name: str
    path: str | None
    """A file or folder on this machine; None: a set of the Hugging Face hub."""
    revision: str
    digest: str
    rows: Mapping[str, int]
    """What is counted, such as "rows.sft" -> rows."""


def open_store(workspace: Path) -> Store:
    """The store of MLFLOW_TRACKING_URI, else a SQLite file in the workspace, made and migrated if need be.

    Call it before a worker starts: processes that create one database at once break each other. The experiment is that
    of MLFLOW_EXPERIMENT_NAME, else "rlhf-flows". Raises ValueError for a store that cannot be used.
    """
    workspace = workspace.expanduser().resolve()
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = _absolute(given) if given else f"sqlite:///{workspace / 'mlflow.db'}"
    _quiet()
    if not uri.startswith("sqlite:"):
        return _open_server(uri, workspace)
    database = Path(uri.removeprefix("sqlite:///"))
    artifacts = database.parent / "mlartifacts"
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_file(uri), is_singleton=True):
        if not database.exists():
            _create_database(database, artifacts)
        elif database.parent == workspace:
            _migrate_database(database)
        experiment, experiment_id = _experiment(uri, artifacts)
    return Store(uri, str(workspace), str(artifacts), experiment, experiment_id)


def start_run(store: Store, config: RunConfig, tags: Mapping[str, str], run_name: str | None = None) -> str:
    """Start the MLflow run of a flow run, with its resolved config as params and as config.yaml. Returns its id."""
    tree = config.model_dump(mode="json")
    run_id = _create_run(store, run_name or config.name, {"rlhf.name": config.name, **tags})
    _log_params(store, run_id, tree)
    _client(store.uri).log_text(run_id, yaml.safe_dump(redacted(tree), sort_keys=False), "config.yaml")
    return run_id


def end_run(store: Store, run_id: str, status: str) -> None:
    """End a run: FINISHED, FAILED or KILLED."""
    assert status in ("FINISHED", "FAILED", "KILLED"), status
    _client(store.uri).set_terminated(run_id, status)


def set_status(store: Store, run_id: str, status: str) -> None:
    """Say of a run that it goes on, RUNNING, or that it will later, SCHEDULED."""
    assert status in ("RUNNING", "SCHEDULED"), status
    _client(store.uri).update_run(run_id, status)


def stage_run(store: Store, parent_id: str, stage: str, directory: Path) -> str:
    """The run of a stage that is about to be made, nested in that of the flow run. Returns its id.

    The id is kept beside the stage's other records: a stage that resumes goes on with its run, which then belongs to
    the flow run that resumed it.
    """
    from mlflow.exceptions import MlflowException

    client = _client(store.uri)
    if kept := _kept_run(store, directory):
        try:
            first_parent = client.get_run(kept).data.tags.get("mlflow.parentRunId", parent_id)
            client.update_run(kept, "RUNNING")
            if first_parent != parent_id:
                _set_tags(store, kept, {"mlflow.parentRunId": parent_id, "rlhf.resumed_from": first_parent})
            return kept
        except MlflowException:
            pass  # deleted meanwhile
    run_id = _create_run(store, stage, {"mlflow.parentRunId": parent_id, "rlhf.stage": stage})
    (directory / RECORDS).mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORDS / RUN_FILE, {"store": _plain(store.uri), "run_id": run_id})
    return run_id


def finish_stage(store: Store, run_id: str, ref: StageRef, datasets: Sequence[tuple[str, Path, str]] = ()) -> None:
    """End a stage's run with what the stage came to: its final metrics, config, identity and inputs.

    Args:
        datasets: what the stage read, as (name, file or stage directory, context); context is "training" or
            "evaluation", as MLflow calls them.
    """
    client = _client(store.uri)
    manifest = read_manifest(ref.directory) or {}
    _log_params(store, run_id, manifest.get("config", {}))
    inputs = {f"rlhf.input.{role}": _identity(entry) for role, entry in manifest.get("inputs", {}).items()}
    code = manifest.get("code", {})
    tags = {
        "rlhf.fingerprint": ref.fingerprint,
        "rlhf.digest": ref.digest,
        "rlhf.directory": ref.path,
        "rlhf.seconds": f"{ref.seconds:.1f}",
        "rlhf.code": code.get("digest", ""),
        "mlflow.source.git.commit": code.get("commit", ""),
        **inputs,
    }
    metrics = {f"final/{name}": value for name, value in _numbers(ref.metrics)}
    _log(store, run_id, tags={name: value for name, value in tags.items() if value}, metrics=metrics)
    if datasets:
        client.log_inputs(run_id, datasets=[_dataset(name, path, context) for name, path, context in datasets])
    client.set_terminated(run_id, "FINISHED")
    run = client.get_run(run_id).data.tags
    if parent := run.get("mlflow.parentRunId"):
        _summarise(store, parent, run.get("rlhf.stage", ref.stage), ref, run_id)


def link_cached(store: Store, parent_id: str, ref: StageRef, stage: str | None = None) -> None:
    """Say in a flow run's MLflow run which earlier run made a stage that was not made again."""
    _summarise(store, parent_id, stage or ref.stage, ref, _kept_run(store, ref.directory))


def set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Tag a run."""
    _set_tags(store, run_id, tags)


def log_file(store: Store, run_id: str, path: Path, folder: str | None = None) -> None:
    """Keep a file, such as the report, with a run."""
    _client(store.uri).log_artifact(run_id, str(path), folder)


def log_table(store: Store, run_id: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Keep a table with a run, in place of an earlier one of that name; MLflow's UI shows it as one."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    columns = list(rows[0])
    table = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
    _client(store.uri).log_dict(run_id, table, name)
    _set_tags(store, run_id, {MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": name, "type": "table"}])})


def log_sources(store: Store, run_id: str, sources: Iterable["Source"]) -> None:
    """Name the sets that a run was made from as its dataset inputs, each with its digest, revision and rows."""
    from mlflow.entities import DatasetInput, InputTag

    inputs = []
    for source in sources:
        tags = {"mlflow.data.context": "training", "revision": source.revision, **source.rows}
        entity = _source_dataset(source)._to_mlflow_entity()
        inputs.append(DatasetInput(entity, [InputTag(key, str(value)) for key, value in tags.items()]))
    _client(store.uri).log_inputs(run_id, datasets=inputs)


def log_model(store: Store, run_id: str, name: str, metrics: Mapping[str, float], table: Path) -> str:
    """A logged model of a run, its metrics linked to the table that they were measured on. Returns its id.

    Without a folder of its own: the version that names it in its tag `logged_model` says where its files lie.
    """
    from mlflow.entities import LoggedModelStatus, Metric

    client = _client(store.uri)
    measured_on = _dataset(table.stem, table, "evaluation")
    client.log_inputs(run_id, datasets=[measured_on])
    model_id = str(client.create_logged_model(store.experiment_id, name, source_run_id=run_id).model_id)
    link = {"model_id": model_id, "dataset_name": table.stem, "dataset_digest": measured_on.dataset.digest}
    now = time.time_ns() // 1_000_000
    client.log_batch(
        run_id, metrics=[Metric(_key(key), value, now, 0, run_id=run_id, **link) for key, value in metrics.items()]
    )
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    return model_id


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
    client = _client(store.uri)
    with _registry_lock(store):
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
        uri = _client(store.uri).get_model_version_download_uri(version.name, str(version.version))
        fetched = Path(download_artifacts(uri, dst_path=str(folder), tracking_uri=store.uri))
    except (MlflowException, OSError) as error:
        raise ValueError(f"its files could not be fetched from {version.source} ({_first_line(error)})") from None
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
        uri = _client(store.uri).get_model_version_download_uri(version.name, str(version.version))
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
    return sorted(model.name for model in _pages(_client(store.uri).search_registered_models))


def versions(store: Store, name: str) -> list[Version]:
    """The versions of a registered model, the newest first; none if there is no such model."""
    from mlflow.exceptions import MlflowException

    client = _client(store.uri)
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    found = _pages(client.search_model_versions, filter_string=f"name = '{name}'")
    return sorted((_version(entry, aliases) for entry in found), key=lambda version: -version.version)


def alias(store: Store, name: str, alias: str) -> Version | None:
    """The version that an alias of a registered model points at, if any."""
    return next((version for version in versions(store, name) if alias in version.aliases), None)


def set_alias(store: Store, name: str, alias: str, version: int) -> None:
    """Point an alias at a version."""
    _client(store.uri).set_registered_model_alias(name, alias, str(version))


def delete_alias(store: Store, name: str, alias: str) -> None:
    """Take an alias away from a registered model."""
    _client(store.uri).delete_registered_model_alias(name, alias)


def model_tags(store: Store, name: str) -> dict[str, str]:
    """The tags of a registered model, which all its versions share."""
    return dict(_client(store.uri).get_registered_model(name).tags)


def tag_model(store: Store, name: str, tags: Mapping[str, str]) -> None:
    """Tag a registered model."""
    client = _client(store.uri)
    for key, value in tags.items():
        client.set_registered_model_tag(name, key, value)


def tag_version(store: Store, name: str, version: int, tags: Mapping[str, str]) -> None:
    """Tag a version of a registered model."""
    client = _client(store.uri)
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, value)


def add_to_description(store: Store, name: str, version: int, title: str, text: str) -> None:
    """Put a text under a title at the end of a version's description, in place of what stood there."""
    client = _client(store.uri)
    before, _, _ = (client.get_model_version(name, str(version)).description or "").partition(f"\n\n{title}\n")
    client.update_model_version(name, str(version), f"{before}\n\n{title}\n{text}"[:LONGEST_DESCRIPTION])


def delete_version(store: Store, version: Version) -> None:
    """Take a version out of the registry. Raises ValueError if an alias points at it meanwhile."""
    with _registry_lock(store):
        if aliases := find_version(store, version.name, version.version).aliases:
            raise ValueError(f"{version.name} version {version.version} is {', '.join(aliases)} now, so it stays")
        _client(store.uri).delete_model_version(version.name, str(version.version))


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


def registry_lock(store: Store) -> Any:
    """Held (`with`) while several registry calls have to happen as one; holds off other processes on this machine."""
    return _registry_lock(store)


def run_url(store: Store, run_id: str) -> str | None:
    """The address of a run in the MLflow UI; None where no server shows it (see `how_to_open`)."""
    page = f"/#/experiments/{store.experiment_id}/runs/{run_id}"
    return None if store.is_local else _plain(store.uri).rstrip("/") + page


def model_url(store: Store, name: str, version: int | None = None) -> str | None:
    """The address of a registered model or version in the MLflow UI; None where no server shows it."""
    page = f"/#/models/{name}" + (f"/versions/{version}" if version is not None else "")
    return None if store.is_local else _plain(store.uri).rstrip("/") + page


def how_to_open(store: Store) -> str:
    """What to do to see the store in a browser, as a sentence."""
    if store.is_local:
        return f"Run `rlhf ui`, or `mlflow server --backend-store-uri {store.uri}`."
    return f"Open {_plain(store.uri)}."


def redacted(tree: Any) -> Any:
    """A config tree without the values of keys that look like secrets and without credentials in addresses."""
    if isinstance(tree, Mapping):
        # "max_prompt_tokens" is a number, no secret: only text can be one.
        return {
            key: "***" if isinstance(value, str) and SECRET.search(str(key)) else redacted(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return _plain(tree) if isinstance(tree, str) else tree


def flattened(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key -> text of every value of a tree; a list is one value, and long values are cut."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = tree if isinstance(tree, str) else json.dumps(tree)
        yield prefix, text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


class Tracker:
    """Logs a stage's metrics by step, from a thread of its own, so that training waits neither for MLflow's import nor
    for its server.

    Processor, memory, disk, network and GPUs of this machine are logged beside them by MLflow's own monitor.

    Metrics are sent every two seconds and on `close`. What cannot be sent is tried again; training never fails for it:
    the first failure is told once on stderr, and `records/metrics.jsonl` has every value anyhow.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        # A server that is down is noticed within seconds, not after MLflow's minutes of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        _quiet()
        self._uri, self._run_id = uri, run_id
        self._queue: queue.SimpleQueue[tuple[int, int, dict[str, float]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step; returns at once."""
        self._queue.put((time.time_ns() // 1_000_000, step, {name: float(value) for name, value in metrics.items()}))

    def close(self) -> None:
        """Send what is left; gives up after a quarter of a minute."""
        self._closing.set()
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"no answer in {SECONDS_TO_CLOSE:.0f} s"))

    def _work(self) -> None:
        waiting: list[Any] = []
        closing = False
        machine: Any = None
        while not closing:
            closing = self._closing.wait(SECONDS_BETWEEN_FLUSHES)
            try:
                machine = machine or _machine_monitor(self._uri, self._run_id)
                self._send(waiting)
            except Exception as error:  # whatever it is: training goes on
                self._warn(error)
                del waiting[:-WAITING_METRICS]
        if machine is not None:
            machine.finish()

    def _send(self, waiting: list[Any]) -> None:
        from mlflow.entities import Metric

        while not self._queue.empty():
            when, step, metrics = self._queue.get()
            waiting += [Metric(name, value, when, step) for name, value in metrics.items()]
        while waiting:
            _client(self._uri).log_batch(self._run_id, metrics=waiting[:1000])
            del waiting[:1000]

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            text = f"MLflow took no metrics ({reason}); training goes on, and records/metrics.jsonl has them"
            print(_plain(text), file=sys.stderr, flush=True)


def _quiet() -> None:
    """No usage data for MLflow's makers, no talk about tables and migrations, no address with its password in it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # "View run at", with the password of the URI
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # of a server that is down, the tracker tells


def _machine_monitor(uri: str, run_id: str) -> Any:
    """MLflow's own watch over this machine, started: `system/...`, every ten seconds, from a thread of its own."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _absolute(uri: str) -> str:
    """A tracking URI that means the same in every process, whatever folder that runs in."""
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise ValueError(
            f"MLFLOW_TRACKING_URI is {uri}, a folder, which MLflow no longer writes to: give sqlite:///PATH or the "
            "address of an MLflow server."
        )
    if scheme == "sqlite":
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().resolve()}"
    return uri


def _plain(text: str) -> str:
    """A text without the user and password of addresses in it."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)


def _lock_file(uri: str) -> Path:
    database = Path(uri.removeprefix("sqlite:///"))
    return database.with_name(f".{database.name}.lock")


@contextmanager
def _registry_lock(store: Store) -> Iterator[None]:
    # A server gives no lock: those who share the workspace at least hold each other off.
    file = _lock_file(store.uri) if store.is_local else Path(store.workspace) / ".registry.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    # One lock object per process and file, so that a caller that holds the lock may call what takes it too.
    with FileLock(file, is_singleton=True):
        yield


def _create_database(database: Path, artifacts: Path) -> None:
    """A fresh database, at once whole: MLflow's hundred migrations commit one by one, which a disk makes slow."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    memory = Path("/dev/shm")
    fast = str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        fresh = Path(folder) / "mlflow.db"
        SqlAlchemyStore(f"sqlite:///{fresh}", str(artifacts)).engine.dispose()
        draft = database.with_name(f".{database.name}.{os.getpid()}")
        shutil.copyfile(fresh, draft)
        draft.replace(database)


def _migrate_database(database: Path) -> None:
    """Bring a database that an older MLflow made up to date, keeping a copy of it as it was."""
    from mlflow.store.db.utils import _get_latest_schema_revision, _upgrade_db
    from sqlalchemy import create_engine

    if _schema_of(database) == _get_latest_schema_revision():
        return
    backup = database.with_name(f"{database.name}.before-migration")
    shutil.copyfile(database, backup)
    engine = create_engine(f"sqlite:///{database}")
    try:
        _upgrade_db(engine)
    except Exception as error:
        shutil.copyfile(backup, database)
        raise ValueError(
            f"{database} was made by another MLflow and cannot be migrated to this one ({_first_line(error)}): move it "
            "away, or use the MLflow that made it."
        ) from None
    finally:
        engine.dispose()


def _schema_of(database: Path) -> str | None:
    """The schema revision of a database, as MLflow's migrations leave it there."""
    with closing(sqlite3.connect(database)) as connection:
        try:
            row = connection.execute("select version_num from alembic_version").fetchone()
        except sqlite3.DatabaseError:
            return None
    return row[0] if row else None


def _open_server(uri: str, workspace: Path) -> Store:
    from mlflow.exceptions import MlflowException

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's own 7 take minutes
    try:
        experiment, experiment_id = _experiment(uri, None)
    except MlflowException as error:
        raise ValueError(
            f"The MLflow store {_plain(uri)} does not answer ({_plain(_first_line(error))}): start it, correct "
            "MLFLOW_TRACKING_URI, or unset it to use a file in the workspace."
        ) from None
    return Store(uri, str(workspace), None, experiment, experiment_id)


def _experiment(uri: str, artifacts: Path | None) -> tuple[str, str]:
    """Name and id of the experiment that the runs go to, made if need be."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    client = _client(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            location = (artifacts / name).as_uri() if artifacts else None
            return name, client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"The MLflow experiment {name} was deleted: restore it with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or name another with MLFLOW_EXPERIMENT_NAME."
        )
    return name, found.experiment_id


def _create_run(store: Store, name: str, tags: Mapping[str, str]) -> str:
    every = {"mlflow.user": _user(), "mlflow.source.name": "rlhf", "mlflow.source.type": "LOCAL", **tags}
    run = _client(store.uri).create_run(store.experiment_id, tags=redacted(dict(every)), run_name=name)
    return str(run.info.run_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        return "unknown"


def _kept_run(store: Store, directory: Path) -> str | None:
    """The id of the run that a stage directory keeps, if it is one of this store."""
    try:
        kept = json.loads((directory / RECORDS / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
    return str(kept["run_id"]) if kept.get("store") == _plain(store.uri) else None


def _summarise(store: Store, parent_id: str, stage: str, ref: StageRef, run_id: str | None) -> None:
    """Final metrics and identity of a stage in the flow run's own run, where runs are compared."""
    tags = {
        f"stage.{stage}": ref.fingerprint,
        f"stage.{stage}.digest": ref.digest,
        f"stage.{stage}.cached": str(ref.cached).lower(),
    }
    if run_id is not None:
        tags[f"stage.{stage}.run_id"] = run_id
    scalars = {key: value for key, value in ref.metrics.items() if not isinstance(value, Mapping)}
    metrics = {f"{stage}/{name}": value for name, value in _numbers(scalars)}
    _log(store, parent_id, tags=tags, metrics=metrics)


def _log_params(store: Store, run_id: str, tree: Any) -> None:
    from mlflow.entities import Param

    params = [Param(_key(key), value) for key, value in flattened(redacted(tree)) if key]
    client = _client(store.uri)
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])


def _set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    _log(store, run_id, tags=tags, metrics={})


def _log(store: Store, run_id: str, *, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric, RunTag

    now = time.time_ns() // 1_000_000
    _client(store.uri).log_batch(
        run_id,
        metrics=[Metric(_key(name), value, now, 0) for name, value in metrics.items()][:900],
        tags=[RunTag(_key(name), value) for name, value in tags.items()],
    )


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in a tree of metrics, by its path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def _key(name: str) -> str:
    """A name that MLflow takes for a metric, param or tag."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _identity(entry: Mapping[str, Any]) -> str:
    return f"{entry['stage']}/{entry['fingerprint']} {entry['digest'][:16]}"


def _dataset(name: str, path: Path, context: str) -> Any:
    """A file or stage as MLflow's dataset input, whose digest is the one in the stage's manifest.

    Written as entities instead of through mlflow.data, which would read the rows to describe them; the source type
    "local" is MLflow's own, so `mlflow.data.get_source(...)` resolves it.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    directory = path if path.is_dir() else path.parent
    manifest = read_manifest(directory)
    assert manifest is not None, f"{directory} is no finished stage"
    file = manifest["files"].get(path.name) if path.is_file() else None
    profile = {"stage": f"{manifest['stage']}/{manifest['fingerprint']}", "stage_digest": manifest["digest"]}
    if path.suffix == ".arrow":
        profile = {"num_rows": _rows(path), **profile}
    dataset = Dataset(
        name=name,
        digest=(file["sha256"] if file else manifest["digest"])[:16],
        source_type="local",
        source=json.dumps({"uri": str(path)}),
        schema=_schema(path),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _source_dataset(source: Source) -> Any:
    """A set as MLflow's own dataset: its source says where it can be had again, its rows are not copied."""
    from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource

    where = (
        HuggingFaceDatasetSource(source.name, revision=source.revision)
        if source.path is None
        else LocalArtifactDatasetSource(source.path)
    )
    return MetaDataset(where, name=source.name, digest=source.digest[:16])


def _rows(path: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(source))


def _schema(path: Path) -> str | None:
    """The columns of an Arrow table as the MLflow UI shows them."""
    if path.suffix != ".arrow":
        return None
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        fields = list(pa.ipc.open_stream(source).schema)
    # MLflow has no name for nested types in a column list; the UI shows what stands there.
    columns = [{"name": field.name, "type": str(field.type), "required": True} for field in fields]
    return json.dumps({"mlflow_colspec": columns})


def _version(entry: Any, aliases: Mapping[str, Any]) -> Version:
    own = tuple(sorted(name for name, number in aliases.items() if str(number) == str(entry.version)))
    created = (entry.creation_timestamp or 0) / 1000
    return Version(entry.name, int(entry.version), own, dict(entry.tags), entry.source, entry.run_id or None, created)


def _pages(search: Any, **arguments: Any) -> Iterable[Any]:
    """All results of one of MLflow's paged searches."""
    page = search(**arguments)
    yield from page
    while page.token:
        page = search(page_token=page.token, **arguments)
        yield from page


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
