"""What the project tells Prefect of a champion, as events, and which deployment an event comes from.

    rlhf.champion.changed      another version serves: promoted, by its gates or by a person, rolled back, or found
                               moved by hand
    rlhf.champion.below-gate   measured beside a candidate, on today's prompts, the champion misses a gate of the config

`flows.automations` makes what waits for them; those of data and stages are in `tasks.assets`.
"""

from collections.abc import Sequence
from functools import lru_cache
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from tasks.gates import GateResult

CHANGED = "rlhf.champion.changed"
BELOW_GATE = "rlhf.champion.below-gate"
FROM = "rlhf.deployment"
"""Label of an event's resource: the id of the deployment whose run sends it, or NOWHERE. A deployment that starts at an
event leaves out those of its own runs by it: else a run would start the next one, for ever."""
NOWHERE = "none"


def champion_key(name: str) -> str:
    """The resource of a registered policy's champion."""
    return f"models:/{name}@champion"


def champion_changed(name: str, version: int, reason: str) -> None:
    """Tell that this version of a registered policy serves from now on, and why, as a sentence."""
    _emit(CHANGED, name, {"version": version, "reason": reason})


def champion_below_gate(name: str, version: int, missed: Sequence[GateResult]) -> None:
    """Tell that the champion misses these gates."""
    reason = f"{name} version {version} serves and misses: " + "; ".join(
        f"{gate.title} {gate.measured}, wanted {gate.sentence}" for gate in missed
    )
    _emit(BELOW_GATE, name, {"version": version, "reason": reason})


def root_run() -> str:
    """The id of this flow run, or of the one that its subflow belongs to; nothing outside of a run."""
    return _root(str(flow_run.id)) if flow_run.id else ""


@lru_cache
def _root(run_id: str) -> str:
    return str(flow_run.root_flow_run_id)  # three requests to the server, in a subflow


def sender() -> str:
    """The id of the deployment that this run is of, also in its subflows; NOWHERE for a run of no deployment."""
    run_id = root_run()
    return _deployment(UUID(run_id)) if run_id else NOWHERE


@lru_cache
def _deployment(run_id: UUID) -> str:
    with get_client(sync_client=True) as client:
        return str(client.read_flow_run(run_id).deployment_id or NOWHERE)


def _emit(event: str, name: str, payload: dict[str, str | int]) -> None:
    if PREFECT_API_URL.value() is None:
        return  # nobody listens, and Prefect would start a server for it
    resource = {"prefect.resource.id": champion_key(name), "prefect.resource.name": name, FROM: sender()}
    emit_event(event=event, resource=resource, payload=payload)
