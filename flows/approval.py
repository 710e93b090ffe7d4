"""Asking a person before a candidate becomes champion: the run is suspended until somebody fills in a form in Prefect.

A suspended run has no process and holds no GPU, and survives a restart of the server. The automations
of its deployment (`flows.automations`) tell of it, remind of it and, when its time is over, send it on with an empty
form: nobody decided.
"""

from dataclasses import replace
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from pydantic import Field

from tasks import approval, dag, tracking, unfinished
from tasks.approval import TAG, WAITING, Waiting
from tasks.promote import Consent, judge
from tasks.steps import Run

UNDECIDED = "not decided"


class Approval(RunInput):
    """The form that decides on a candidate. Every field has a default: an empty form is what a timeout sends."""

    decision: Literal["not decided", "approve", "reject"] = Field(
        "not decided",
        description="approve: it serves from now on. reject: it stays a candidate.",
    )
    comment: str = Field("", description="Why; kept with the decision.")
    name: str = Field("", description="Who decides; kept in the history of the model.")


def consent(run: Run, waiting: Waiting) -> Consent | None:
    """What a person says to the candidate; None where nobody has to be asked: by config, or as it misses its gates.

    Suspends the flow run the first time, which ends this process by Prefect's Pause. A run without a deployment cannot
    be suspended: nobody is asked, and the candidate is not promoted.
    """
    if run.config.promote.approval == "none" or waiting.consent is not None:
        return waiting.consent
    workspace, run_id = dag.workspace(run.config), str(flow_run.id)
    name, version = waiting.registration.policy, waiting.registration.policy_version
    came_back = approval.read(workspace, run_id) is not None
    if not came_back:
        candidate = tracking.find_version(run.store, name, version)
        verdict = judge(candidate, tracking.alias(run.store, name, tracking.CHAMPION), waiting.judgement)
        if not verdict.promoted:
            return None
        if deployment.id is None:
            return Consent("unasked")
        approval.write(workspace, run_id, waiting)
        unfinished.suspended(workspace, run_id, run.config.promote.approval_hours)
        where = flow_run.ui_url or f"flow run {flow_run.name}"
        tracking.tag_version(run.store, name, version, {TAG: f"{WAITING}: {where}"})
    # The key is the candidate's: an answer is never taken for one about another.
    form = Approval.with_initial_data(description=_question(waiting, tracking.model_url(run.store, name, version)))
    said = decided(suspend_flow_run(wait_for_input=form, key=f"approve-{name}-{version}"))
    approval.write(workspace, run_id, replace(waiting, consent=said))
    return said


def decided(form: Approval) -> Consent:
    """What a form says that came back."""
    if form.decision == UNDECIDED:
        return Consent("undecided")
    decision: Literal["approved", "rejected"] = "approved" if form.decision == "approve" else "rejected"
    return Consent(decision, form.name.strip() or "somebody in Prefect's UI", form.comment.strip())


def ended(run_id: str) -> Literal["cancelled", "failed"] | None:
    """How a flow run ended without coming back from its wait; None if it may, or if this server does not know it."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(run_id)).state
        except ObjectNotFound:
            return None
    if state is None:
        return None
    return "cancelled" if state.is_cancelled() else "failed" if state.is_failed() else None


def _question(waiting: Waiting, url: str | None) -> str:
    """What stands above the form."""
    name, version = waiting.registration.policy, waiting.registration.policy_version
    title = f"[{name} version {version}]({url})" if url else f"{name} version {version}"
    against = waiting.judgement.champion
    instead = f" instead of version {against}" if against else ", the first"
    gates = [f"- {gate.title}: {gate.measured}, wanted {gate.sentence}" for gate in waiting.judgement.gates]
    passed = ["It passes its gates:", "", *gates] if gates else ["Its run sets no gate."]
    return "\n".join([f"Shall {title} become champion{instead}?", "", *passed])
