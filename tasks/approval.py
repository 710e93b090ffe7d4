"""What a run needs to go on when it comes back from a person's decision, kept while it is suspended.

Prefect runs a suspended flow again from its top. Between the two the sets on the hub, the champion and the code may
have changed, and the candidate that was asked about would be made anew; so what was there to decide on is written to
`<workspace>/approvals/<flow run>.json`, and the run that comes back goes straight to the promotion.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tasks import tracking, unfinished
from tasks.gates import GateResult
from tasks.promote import Consent, Judgement, promote
from tasks.register import Registration
from tasks.stages import MANIFEST, StageRef, write_json
from tasks.tracking import Store

FOLDER = "approvals"
WAITING = "waiting"
TAG = "approval"
"""Of a version: WAITING and where to decide, later what was said."""


@dataclass(frozen=True)
class Waiting:
    """A candidate that passes its gates, with all that its run has made."""

    refs: Mapping[str, StageRef]
    registration: Registration
    judgement: Judgement
    mlflow_run: str
    consent: Consent | None = None
    """What was said, as soon as it is known: a run that dies after that does not ask again."""


def write(workspace: Path, flow_run_id: str, waiting: Waiting) -> None:
    """Keep what a flow run waits with."""
    path = _path(workspace, flow_run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file sorts its keys, and the steps are shown in the order in which they were made.
    write_json(path, asdict(replace(waiting, refs=dict(waiting.refs))) | {"order": list(waiting.refs)})


def read(workspace: Path, flow_run_id: str) -> Waiting | None:
    """What a flow run waited with; None if it did not, or if a stage of it is gone, so that it has to be made again."""
    try:
        waiting = _load(_path(workspace, flow_run_id))
    except FileNotFoundError:
        return None
    return waiting if all((ref.directory / MANIFEST).is_file() for ref in waiting.refs.values()) else None


def settle(store: Store, workspace: Path, ended: Callable[[str], Literal["cancelled", "failed"] | None]) -> None:
    """Write down of candidates whose runs ended while they waited that they were not promoted.

    Such a run has no process that could: it is done by who looks next.

    Args:
        ended: flow run id -> how that run ended; None: it may still come back.
    """
    waiting = {path.stem: _load(path) for path in (workspace / FOLDER).glob("*.json")}
    over = {run_id: how for run_id in waiting if (how := ended(run_id)) is not None}
    asked_still = {_asked(waiting[run_id]) for run_id in waiting.keys() - over.keys()}
    for run_id, how in over.items():
        name, number = asked = _asked(waiting[run_id])
        known = next((entry for entry in tracking.versions(store, name) if entry.version == number), None)
        if known is not None and where_to_decide(known.tags) and asked not in asked_still:
            promote(store, name, number, waiting[run_id].judgement, consent=Consent(how))
        with suppress(Exception):  # the MLflow run was deleted meanwhile
            tracking.end_run(store, waiting[run_id].mlflow_run, "KILLED" if how == "cancelled" else "FAILED")
        forget(workspace, run_id)
        unfinished.forget(workspace, run_id)


def _asked(waiting: Waiting) -> tuple[str, int]:
    return waiting.registration.policy, waiting.registration.policy_version


def _load(path: Path) -> Waiting:
    tree = json.loads(path.read_text())
    judged = tree["judgement"]
    return Waiting(
        {key: StageRef(**tree["refs"][key]) for key in tree["order"]},
        Registration(**tree["registration"]),
        Judgement(**judged | {"gates": [GateResult(**gate) for gate in judged["gates"]]}),
        tree["mlflow_run"],
        Consent(**tree["consent"]) if tree["consent"] else None,
    )


def forget(workspace: Path, flow_run_id: str) -> None:
    """The run has come to its end."""
    _path(workspace, flow_run_id).unlink(missing_ok=True)


def where_to_decide(tags: Mapping[str, str]) -> str | None:
    """Where a person has to decide on a version, by its tags; None where nobody has to."""
    said = tags.get(TAG, "")
    return said.removeprefix(f"{WAITING}: ") if said.startswith(WAITING) else None


def _path(workspace: Path, flow_run_id: str) -> Path:
    return workspace / FOLDER / f"{flow_run_id}.json"
