"""Promotion as a flow of its own, so that every move of a champion shows in Prefect: the last step of a retraining,
and what `rlhf promote` runs."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from tasks import tracking
from tasks.promote import Judgement, Verdict, promote_model, resolve


@flow(name="promotion", flow_run_name="promote-{name}-{version}")
def promotion(name: str, version: int, workspace: str, judgement: Judgement | None = None) -> Verdict:
    """Make a version of a policy the champion if it deserves it, or, without a judgement, because a person says so.

    Args:
        name: the registered policy, `chat-policy` or in short `chat`.
        workspace: the folder whose store is used unless MLFLOW_TRACKING_URI names another.
        judgement: what the candidate was measured at.
    """
    store = tracking.open_store(Path(workspace))
    policy = resolve(store, name)
    verdict = promote_model(store, policy, version, judgement)
    get_run_logger().info(verdict.reason)
    create_markdown_artifact(_markdown(store, policy, version, verdict), key="promotion", description=verdict.reason)
    return verdict


def _markdown(store: tracking.Store, name: str, version: int, verdict: Verdict) -> str:
    url = tracking.model_url(store, name, version)
    where = f"[{name} version {version}]({url})" if url else f"{name} version {version}. {tracking.how_to_open(store)}"
    return f"**{'Promoted' if verdict.promoted else 'Not promoted'}.** {verdict.reason}\n\n{where}\n"
