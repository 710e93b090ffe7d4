"""What Prefect's server does by itself for a deployment of `retrain`, as its automations.

- A run whose heartbeats stop has crashed, and one that crashed is scheduled again, as the same run.
- A run that waits for approval goes on, undecided, when its time is over.
- A set that changes, and a champion that falls below a gate, start a run.
- A failure, a run that waits for approval, and a champion that changes are told to the notification blocks.

The events of the middle line are those of `tasks.assets` and `tasks.events`, from runs of other deployments and of
`rlhf run`; and the asset events of others who write a set, such as a task `@materialize("dataset://NAME")`.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument, StateType
from prefect.events import EventTrigger
from prefect.events.actions import ChangeFlowRunState, ResumeFlowRun, RunDeployment, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, Posture
from prefect.exceptions import ObjectNotFound

from tasks import assets, events
from tasks.config import ConfigError, PromoteConfig
from tasks.register import policy_name

HEARTBEAT_SECONDS = 60
SECONDS_TO_ZOMBIE = 4 * HEARTBEAT_SECONDS
STILL = ("Completed", "Failed", "Crashed", "Cancelled", "Paused", "Suspended")
"""States in which a run sends no heartbeats."""
WAITING = ("Paused", "Suspended")
SHORTEST_WAIT = timedelta(seconds=10)
"""That Prefect's triggers can count."""
ANY_RUN: dict[str, str | list[str]] = {"prefect.resource.id": "prefect.flow-run.*"}
TITLES = (
    "dead runs have crashed",
    "crashed runs start again",
    "a new revision of a set starts a run",
    "a set that others write starts a run",
    "a champion below a gate starts a run",
    "failures are told",
    "a run that nobody decided on goes on",
    "waiting for approval is told",
    "waiting for approval is told again",
    "a new champion is told",
)


def renew(
    client: SyncPrefectClient,
    deployment_id: UUID,
    name: str,
    *,
    model: str,
    sources: Sequence[str],
    on_events: bool,
    blocks: Sequence[UUID],
    waits: PromoteConfig,
) -> None:
    """Make the automations of a deployment. Of those that it had, the ones that are as they should be stay: they may be
    counting the time of a run that waits.

    Args:
        name: of the deployment.
        model: the `name` of its run config.
        sources: the preference sets that it reads.
        on_events: runs start when a set changes or the champion falls below a gate.
        blocks: ids of the notification blocks that are told.
        waits: how long a run waits for a person.
    """
    known = {f"retrain/{name}: {title}" for title in TITLES}
    standing = [old for old in client.read_automations() if old.name in known]
    made = [*_watching(deployment_id), *_ending(deployment_id, waits)]
    made += _starting(deployment_id, policy_name(model), sources) if on_events else []
    made += _telling(deployment_id, policy_name(model), blocks, waits) if blocks else []
    assert all(automation.name in TITLES for automation in made)
    wanted = [entry.model_copy(update={"name": f"retrain/{name}: {entry.name}"}) for entry in made]
    kept = [old for old in standing if any(_same(old, automation) for automation in wanted)]
    for old in standing:
        if old not in kept:
            client.delete_automation(old.id)
    for automation in wanted:
        if automation.name not in {old.name for old in kept}:
            client.create_automation(automation)


def _same(standing: Automation, wanted: AutomationCore) -> bool:
    """Whether what the server has is what is wanted, but for the id that it gave."""
    return AutomationCore.model_validate(standing.model_dump(exclude={"id"})) == wanted


def notification_block(client: SyncPrefectClient, slug: str) -> UUID:
    """The id of a saved notification block that is named as TYPE/NAME, such as slack-webhook/team.

    Its secrets are not read. Raises ConfigError that names those there are.
    """
    kind, _, name = slug.partition("/")
    try:
        found = client.read_block_document_by_name(name, kind, include_secrets=False)
    except ObjectNotFound:
        pass
    else:
        if _notifies(found):
            return found.id
    saved = [one for one in client.read_block_documents(include_secrets=False) if _notifies(one)]
    names = sorted(f"{one.block_type.slug}/{one.name}" for one in saved if one.block_type is not None)
    raise ConfigError(
        f"--notify {slug}: Prefect has no notification block of that name, there "
        f"{'are ' + ', '.join(names) if names else 'is none yet'}; make one in Prefect's UI under Blocks, and give its "
        "type and name, such as slack-webhook/team"
    )


def _notifies(block: BlockDocument) -> bool:
    return block.block_schema is not None and "notify" in block.block_schema.capabilities


def _of(deployment_id: UUID) -> dict[str, str]:
    return {"prefect.resource.role": "deployment", "prefect.resource.id": f"prefect.deployment.{deployment_id}"}


def _at(expect: set[str], match: dict[str, str | list[str]], related: dict[str, str] | None = None) -> EventTrigger:
    """A trigger that fires at these events, at most once a second for the same run, set or model.

    A server whose database was busy goes through an event again, and would act again.
    """
    return EventTrigger(
        expect=expect,
        match=match,
        match_related=related or {},
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(seconds=1),
    )


def _watching(deployment_id: UUID) -> Iterator[AutomationCore]:
    dead = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in STILL)},
        match=ANY_RUN,
        match_related=_of(deployment_id),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SECONDS_TO_ZOMBIE),
    )
    lost = f"It gave no sign of life for {SECONDS_TO_ZOMBIE} s."
    yield AutomationCore(
        name="dead runs have crashed",
        trigger=dead,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name=None, message=lost)],
    )
    again = "It crashed and starts again, from its checkpoints."
    yield AutomationCore(
        name="crashed runs start again",
        trigger=_at({"prefect.flow-run.Crashed"}, ANY_RUN, _of(deployment_id)),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="Rescheduled", message=again)],
    )


def _waiting(deployment_id: UUID, hours: float) -> EventTrigger:
    """Fires when a run has been suspended for so long."""
    return EventTrigger(
        after={"prefect.flow-run.Suspended"},
        expect={f"prefect.flow-run.{state}" for state in ("Resuming", "Cancelling", "Cancelled", "Failed")},
        match=ANY_RUN,
        match_related=_of(deployment_id),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=max(timedelta(hours=hours), SHORTEST_WAIT),
    )


def _ending(deployment_id: UUID, waits: PromoteConfig) -> Iterator[AutomationCore]:
    yield AutomationCore(
        name="a run that nobody decided on goes on",  # with an empty form: see `flows.approval`
        trigger=_waiting(deployment_id, waits.approval_hours),
        actions=[ResumeFlowRun()],
    )


def _starting(deployment_id: UUID, model: str, sources: Sequence[str]) -> Iterator[AutomationCore]:
    """Of the project's own events, those of the deployment's own runs start none."""
    start = RunDeployment(source="selected", deployment_id=deployment_id)
    of_others = {events.FROM: f"!{deployment_id}"}
    revisions = [assets.data_key(source, "*") for source in sources]
    yield AutomationCore(
        name="a new revision of a set starts a run",
        trigger=_at({assets.REFERENCED}, {"prefect.resource.id": revisions, assets.NEW: "true", **of_others}),
        actions=[start],
    )
    written = [key for source in sources for key in (f"dataset://{source}", assets.data_key(source, "*"))]
    yield AutomationCore(
        name="a set that others write starts a run",
        trigger=_at({assets.MATERIALISED}, {"prefect.resource.id": written}),
        actions=[start],
    )
    # Data, config and code may be those of a registered model: that one is set against the champion anew.
    again = RunDeployment(source="selected", deployment_id=deployment_id, parameters={"only_if_new": False})
    yield AutomationCore(
        name="a champion below a gate starts a run",
        trigger=_at({events.BELOW_GATE}, {"prefect.resource.id": events.champion_key(model), **of_others}),
        actions=[again],
    )


def _telling(deployment_id: UUID, model: str, blocks: Sequence[UUID], waits: PromoteConfig) -> Iterator[AutomationCore]:
    def told(subject: str, body: str) -> list[SendNotification]:
        return [SendNotification(block_document_id=block, subject=subject, body=body) for block in blocks]

    of_run = "{{ flow_run.state.message }}\n\n{{ (flow_run | ui_url) or 'flow run ' ~ flow_run.id }}"
    yield AutomationCore(
        name="failures are told",
        trigger=_at({"prefect.flow-run.Failed"}, ANY_RUN, _of(deployment_id)),
        actions=told("{{ flow_run.name }} failed", of_run),
    )
    yield AutomationCore(
        name="waiting for approval is told",
        trigger=_at({f"prefect.flow-run.{state}" for state in WAITING}, ANY_RUN, _of(deployment_id)),
        actions=told("{{ flow_run.name }} waits for approval", of_run),
    )
    yield AutomationCore(
        name="waiting for approval is told again",
        trigger=_waiting(deployment_id, waits.reminder_hours),
        actions=told("{{ flow_run.name }} still waits for approval", of_run),
    )
    yield AutomationCore(
        name="a new champion is told",
        trigger=_at({events.CHANGED}, {"prefect.resource.id": events.champion_key(model)}),
        actions=told(f"{model} version {{{{ event.payload.version }}}} serves", "{{ event.payload.reason }}"),
    )
