"""Where runs and models are recorded: a SQLite file in the workspace, or a server.

The import of mlflow takes seconds, so it stands inside functions, here and in the rooms beside this one.
"""

import logging
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from tasks.tracking.redaction import without_credentials

EXPERIMENT = "rlhf-flows"


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


def open_store(workspace: Path) -> Store:
    """The store of MLFLOW_TRACKING_URI, else a SQLite file in the workspace, made and migrated if need be.

    Call it before a worker starts: processes that create one database at once break each other. The experiment is that
    of MLFLOW_EXPERIMENT_NAME, else "rlhf-flows". Raises ValueError for a store that cannot be used.
    """
    workspace = workspace.expanduser().resolve()
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = _absolute(given) if given else f"sqlite:///{workspace / 'mlflow.db'}"
    quiet()
    if not uri.startswith("sqlite:"):
        return _open_server(uri, workspace)
    database = Path(uri.removeprefix("sqlite:///"))
    artifacts = database.parent / "mlartifacts"
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_file(uri), is_singleton=True):
        if not database.exists():
            _create_database(database, artifacts)
        elif database.parent == workspace:
            _migrate_database(database)
        experiment, experiment_id = _experiment(uri, artifacts)
    return Store(uri, str(workspace), str(artifacts), experiment, experiment_id)


def run_url(store: Store, run_id: str) -> str | None:
    """The address of a run in the MLflow UI; None where no server shows it (see `how_to_open`)."""
    page = f"/#/experiments/{store.experiment_id}/runs/{run_id}"
    return None if store.is_local else without_credentials(store.uri).rstrip("/") + page


def model_url(store: Store, name: str, version: int | None = None) -> str | None:
    """The address of a registered model or version in the MLflow UI; None where no server shows it."""
    page = f"/#/models/{name}" + (f"/versions/{version}" if version is not None else "")
    return None if store.is_local else without_credentials(store.uri).rstrip("/") + page


def how_to_open(store: Store) -> str:
    """What to do to see the store in a browser, as a sentence."""
    if store.is_local:
        return f"Run `rlhf ui`, or `mlflow server --backend-store-uri {store.uri}`."
    return f"Open {without_credentials(store.uri)}."


def quiet() -> None:
    """No usage data for MLflow's makers, no talk about tables and migrations, no address with its password in it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # "View run at", with the password of the URI
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # of a server that is down, the tracker tells


def connect(uri: str) -> Any:
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


def lock_file(uri: str) -> Path:
    database = Path(uri.removeprefix("sqlite:///"))
    return database.with_name(f".{database.name}.lock")


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
    if _schema_of(database) == _latest_schema():
        return
    from mlflow.store.db.utils import _upgrade_db
    from sqlalchemy import create_engine

    backup = database.with_name(f"{database.name}.before-migration")
    shutil.copyfile(database, backup)
    engine = create_engine(f"sqlite:///{database}")
    try:
        _upgrade_db(engine)
    except Exception as error:
        shutil.copyfile(backup, database)
        raise ValueError(
            f"{database} was made by another MLflow and cannot be migrated to this one ({first_line(error)}): move it "
            "away, or use the MLflow that made it."
        ) from None
    finally:
        engine.dispose()


@cache
def _latest_schema() -> str:
    """The schema revision of this MLflow, which reads its hundred migrations to know it."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


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
            f"The MLflow store {without_credentials(uri)} does not answer ({without_credentials(first_line(error))}): "
            "start it, correct MLFLOW_TRACKING_URI, or unset it to use a file in the workspace."
        ) from None
    return Store(uri, str(workspace), None, experiment, experiment_id)


def _experiment(uri: str, artifacts: Path | None) -> tuple[str, str]:
    """Name and id of the experiment that the runs go to, made if need be."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    client = connect(uri)
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


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
