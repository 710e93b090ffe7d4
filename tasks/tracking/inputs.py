"""What a run was made from, as MLflow's dataset inputs."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.stages import read_manifest
from tasks.tracking.redaction import allowed
from tasks.tracking.store import Store, connect


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


def log_sources(store: Store, run_id: str, sources: Iterable["Source"]) -> None:
    """Name the sets that a run was made from as its dataset inputs, each with its digest, revision and rows."""
    from mlflow.entities import DatasetInput, InputTag

    inputs = []
    for source in sources:
        tags = {"mlflow.data.context": "training", "revision": source.revision, **source.rows}
        entity = _source_dataset(source)._to_mlflow_entity()
        inputs.append(DatasetInput(entity, [InputTag(key, str(value)) for key, value in tags.items()]))
    connect(store.uri).log_inputs(run_id, datasets=inputs)


def log_model(store: Store, run_id: str, name: str, metrics: Mapping[str, float], table: Path) -> str:
    """A logged model of a run, its metrics linked to the table that they were measured on. Returns its id.

    Without a folder of its own: the version that names it in its tag `logged_model` says where its files lie.
    """
    from mlflow.entities import LoggedModelStatus, Metric

    client = connect(store.uri)
    measured_on = dataset(table.stem, table, "evaluation")
    client.log_inputs(run_id, datasets=[measured_on])
    model_id = str(client.create_logged_model(store.experiment_id, name, source_run_id=run_id).model_id)
    link = {"model_id": model_id, "dataset_name": table.stem, "dataset_digest": measured_on.dataset.digest}
    now = time.time_ns() // 1_000_000
    client.log_batch(
        run_id, metrics=[Metric(allowed(key), value, now, 0, run_id=run_id, **link) for key, value in metrics.items()]
    )
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    return model_id


def dataset(name: str, path: Path, context: str) -> Any:
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
        from data_prep.tables import count_rows  # late: it takes a second

        profile = {"num_rows": count_rows(path), **profile}
    made = Dataset(
        name=name,
        digest=(file["sha256"] if file else manifest["digest"])[:16],
        source_type="local",
        source=json.dumps({"uri": str(path)}),
        schema=_schema(path),
        profile=json.dumps(profile),
    )
    return DatasetInput(made, [InputTag("mlflow.data.context", context)])


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
