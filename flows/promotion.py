"""Promotion and rollback as flows of their own, so that every move of a champion shows in Prefect: the last step of a
retraining, and what `rlhf promote` and `rlhf rollback` run."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from tasks import events, tracking
from tasks.promote import Consent, Judgement, Verdict, promote_model, resolve, roll_back_model


@flow(name="promotion", flow_run_name="promote-{name}-{version}")
def promotion(
    name: str,
    version: int,
    workspace: str,
    judgement: Judgement | None = None,
    why: str = "",
    consent: Consent | None = None,
) -> Verdict:
    """Make a version of a policy the champion if it deserves it, or, without a judgement, because a person says so.

    Args:
        name: the registered policy, `chat-policy` or in short `chat`.
        workspace: the folder whose store is used unless MLFLOW_TRACKING_URI names another.
        judgement: what the candidate was measured at.
        why: a person's reason.
        consent: what was said to a candidate that a person has to approve.
    """
    store = tracking.open_store(Path(workspace))
    policy = resolve(store, name)
    verdict = promote_model(store, policy, version, judgement, why, consent)
    if verdict.gates:
        lines = [
            {
                "gate": gate.name,
                "wanted": gate.sentence,
                "measured": gate.measured,
                "verdict": "passed" if gate.passed else "failed",
            }
            for gate in verdict.gates
        ]
        create_table_artifact(lines, key="gates", description=verdict.reason)
    _tell(store, policy, version, verdict, "Promoted" if verdict.promoted else "Not promoted", "promotion")
    return verdict


@flow(name="rollback", flow_run_name="roll-back-{name}-{version}")
def rollback(name: str, version: int, workspace: str, why: str = "") -> Verdict:
    """Take a champion back: what served before it serves again. Does nothing if `version` is not the champion.

    Args:
        name: the registered policy, `chat-policy` or in short `chat`.
        version: the champion that is taken back.
        workspace: the folder whose store is used unless MLFLOW_TRACKING_URI names another.
        why: a person's reason.
    """
    store = tracking.open_store(Path(workspace))
    policy = resolve(store, name)
    verdict = roll_back_model(store, policy, version, why)
    _tell(store, policy, version, verdict, "Rolled back" if verdict.promoted else "Not rolled back", "rollback")
    return verdict


def _tell(store: tracking.Store, name: str, version: int, verdict: Verdict, what: str, key: str) -> None:
    get_run_logger().info(verdict.reason)
    if verdict.promoted:
        serving = tracking.alias(store, name, tracking.CHAMPION)
        assert serving is not None
        events.champion_changed(name, serving.version, verdict.reason)
    url = tracking.model_url(store, name, version)
    where = f"[{name} version {version}]({url})" if url else f"{name} version {version}. {tracking.how_to_open(store)}"
    text = f"**{what}.** {verdict.reason}\n\n{where}\n"
    create_markdown_artifact(text, key=key, description=verdict.reason)
