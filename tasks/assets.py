"""Prefect's asset events: each stage is an asset, each preference set one that it refers to.

Prefect emits them for its own `@materialize` tasks and leaves them out where a task is cached; a stage directory is
handed over either way, so they are emitted here, in the same shape (`prefect.context.AssetContext`). They start what
waits for them, such as a deployment with a trigger; for questions about the past there is `tasks.lineage`, since the
server forgets events after seven days.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from prefect.events import emit_event

from tasks.events import FROM, sender
from tasks.stages import StageRef

MATERIALISED = "prefect.asset.materialization.succeeded"
REFERENCED = "prefect.asset.referenced"
NEW = "rlhf.new"
"""Label of a referenced set: "true" where its rows were fetched just now, "false" where they were there."""


def key(ref: StageRef) -> str:
    """The asset of a finished stage: its identity is the digest of its files."""
    return f"rlhf://{ref.stage}/{ref.fingerprint}/{ref.digest[:16]}"


def data_key(name: str, revision: str) -> str:
    """The asset of a preference set at a revision."""
    return f"dataset://{name}@{revision}"


def materialised(ref: StageRef, inputs: Iterable[StageRef], config: Mapping[str, Any]) -> None:
    """Tell Prefect that a stage is there, made or found, and what it was made from."""
    upstream = [key(read) for read in inputs]
    if ref.stage == "download":
        upstream.append(data_key(config["source"], ref.metrics["revision"]))
        labels = {"prefect.resource.id": upstream[-1], NEW: str(not ref.cached).lower(), FROM: sender()}
        emit_event(event=REFERENCED, resource=labels, related=[])
    related = [{"prefect.resource.id": asset, "prefect.resource.role": "asset"} for asset in upstream]
    emit_event(
        event=MATERIALISED,
        resource={
            "prefect.resource.id": key(ref),
            "prefect.resource.name": f"{ref.stage} {config.get('source') or ref.fingerprint}",
            "prefect.asset.url": f"file://{ref.path}",
        },
        related=related,
        payload={"cached": ref.cached, "seconds": ref.seconds, "metrics": ref.metrics},
    )
