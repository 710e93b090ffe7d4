"""A flow run is one MLflow run, each of its stages a run nested in it."""

import getpass
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tasks.config import RunConfig
from tasks.stages import RECORDS, StageRef, read_manifest, write_json
from tasks.tracking.inputs import dataset
from tasks.tracking.redaction import allowed, flattened, redacted, without_credentials
from tasks.tracking.store import Store, connect

RUN_FILE = "mlflow.json"
FLOW_RUN = "prefect.flow_run_id"
"""Tag of the run of a flow run: the flow run's id."""
CONFIG = "rlhf.config"
"""Tag of the run of a flow run: which config it has, with the models' versions that its aliases named then."""


def start_run(store: Store, config: RunConfig, tags: Mapping[str, str], run_name: str | None = None) -> str:
    """Start the MLflow run of a flow run, with its resolved config as params and as config.yaml. Returns its id."""
    tree = config.model_dump(mode="json")
    known = {"rlhf.name": config.name, CONFIG: _digest(config)}
    run_id = _create_run(store, run_name or config.name, known | dict(tags))
    _log_params(store, run_id, tree)
    connect(store.uri).log_text(run_id, yaml.safe_dump(redacted(tree), sort_keys=False), "config.yaml")
    return run_id


def run_of(store: Store, flow_run_id: str, config: RunConfig) -> str | None:
    """The id of the MLflow run that an earlier start of a flow run by this config has left; None if there is none."""
    same = f"tags.`{FLOW_RUN}` = '{flow_run_id}' and tags.`{CONFIG}` = '{_digest(config)}'"
    found = connect(store.uri).search_runs([store.experiment_id], same, max_results=1)
    return str(found[0].info.run_id) if found else None


def _digest(config: RunConfig) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]


def end_dead(store: Store, died: Callable[[str], bool]) -> None:
    """End the runs of flow runs that were killed, and those of their stages: KILLED.

    Args:
        died: flow run id -> whether its process is known to be dead.
    """
    running = connect(store.uri).search_runs([store.experiment_id], "attributes.status = 'RUNNING'")
    dead = {run.info.run_id for run in running if died(run.data.tags.get(FLOW_RUN, ""))}
    for run in running:
        if run.info.run_id in dead or run.data.tags.get("mlflow.parentRunId") in dead:
            end_run(store, run.info.run_id, "KILLED")


def end_run(store: Store, run_id: str, status: str) -> None:
    """End a run: FINISHED, FAILED or KILLED."""
    assert status in ("FINISHED", "FAILED", "KILLED"), status
    connect(store.uri).set_terminated(run_id, status)


def set_status(store: Store, run_id: str, status: str) -> None:
    """Say of a run that it goes on, RUNNING, or that it will later, SCHEDULED."""
    assert status in ("RUNNING", "SCHEDULED"), status
    connect(store.uri).update_run(run_id, status)


def stage_run(store: Store, parent_id: str, stage: str, directory: Path) -> str:
    """The run of a stage that is about to be made, nested in that of the flow run. Returns its id.

    The id is kept beside the stage's other records: a stage that resumes goes on with its run, which then belongs to
    the flow run that resumed it.
    """
    from mlflow.exceptions import MlflowException

    client = connect(store.uri)
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
    write_json(directory / RECORDS / RUN_FILE, {"store": without_credentials(store.uri), "run_id": run_id})
    return run_id


def finish_stage(store: Store, run_id: str, ref: StageRef, datasets: Sequence[tuple[str, Path, str]] = ()) -> None:
    """End a stage's run with what the stage came to: its final metrics, config, identity and inputs.

    Args:
        datasets: what the stage read, as (name, file or stage directory, context); context is "training" or
            "evaluation", as MLflow calls them.
    """
    client = connect(store.uri)
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
        client.log_inputs(run_id, datasets=[dataset(name, path, context) for name, path, context in datasets])
    client.set_terminated(run_id, "FINISHED")
    run = client.get_run(run_id).data.tags
    if parent := run.get("mlflow.parentRunId"):
        _summarise(store, parent, run.get("rlhf.stage", ref.stage), ref, run_id)


def link_cached(store: Store, parent_id: str, ref: StageRef, stage: str | None = None) -> None:
    """Say in a flow run's MLflow run which earlier run made a stage that was not made again."""
    _summarise(store, parent_id, stage or ref.stage, ref, _kept_run(store, ref.directory))


def log_file(store: Store, run_id: str, path: Path, folder: str | None = None) -> None:
    """Keep a file, such as the report, with a run."""
    connect(store.uri).log_artifact(run_id, str(path), folder)


def log_table(store: Store, run_id: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Keep a table with a run, in place of an earlier one of that name; MLflow's UI shows it as one."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    columns = list(rows[0])
    table = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
    connect(store.uri).log_dict(run_id, table, name)
    _set_tags(store, run_id, {MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": name, "type": "table"}])})


def _create_run(store: Store, name: str, tags: Mapping[str, str]) -> str:
    every = {"mlflow.user": _user(), "mlflow.source.name": "rlhf", "mlflow.source.type": "LOCAL", **tags}
    run = connect(store.uri).create_run(store.experiment_id, tags=redacted(dict(every)), run_name=name)
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
    return str(kept["run_id"]) if kept.get("store") == without_credentials(store.uri) else None


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

    params = [Param(allowed(key), value) for key, value in flattened(redacted(tree)) if key]
    client = connect(store.uri)
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])


def _set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    _log(store, run_id, tags=tags, metrics={})


def _log(store: Store, run_id: str, *, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric, RunTag

    now = time.time_ns() // 1_000_000
    connect(store.uri).log_batch(
        run_id,
        metrics=[Metric(allowed(name), value, now, 0) for name, value in metrics.items()][:900],
        tags=[RunTag(allowed(name), value) for name, value in tags.items()],
    )


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in a tree of metrics, by its path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def _identity(entry: Mapping[str, Any]) -> str:
    return f"{entry['stage']}/{entry['fingerprint']} {entry['digest'][:16]}"
