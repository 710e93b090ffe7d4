"""The automations of a deployment on a real Prefect server, with a real receiver of its notifications."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter
from prefect.client.schemas.objects import State, StateType
from prefect.events import emit_event
from prefect.flow_engine import run_flow
from prefect.input.run_input import keyset_from_paused_state
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Failed, Pending, Running, Suspended

from flows import deployments
from flows.approval import Approval, decided, ended
from flows.automations import TITLES
from flows.queued import cancel_covered
from tasks import assets, events
from tasks.config import ConfigError, parse
from tasks.gates import GateResult
from tasks.stages import StageRef

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TOKEN = "t0ken-of-the-webhook"
SET = "Dahoas/rm-static"


@pytest.fixture(scope="module")
def connected(prefect_api: str) -> Iterator[str]:
    with temporary_settings({PREFECT_API_URL: prefect_api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield prefect_api


@pytest.fixture(scope="module")
def received() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Address of an HTTP server, and what was posted to it; what it does not know it refuses."""
    bodies: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.headers["Authorization"] == f"Bearer {TOKEN}" and self.path == "/hook"
            if known:
                bodies.append(body)
            self.send_response(200 if known else 403)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()


@pytest.fixture(scope="module")
def client(connected: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def request_(connected: str, received: tuple[str, list[dict[str, Any]]]) -> deployments.Request:
    webhook("team", f"{received[0]}/hook").save("team")
    config = deployments.absolute(parse({"name": "told"}))
    return deployments.Request("told", config, pool="nobody-works-here", notify=("custom-webhook/team",))


@pytest.fixture(scope="module")
def deployed(request_: deployments.Request) -> UUID:
    return deployments.deploy(request_)


def webhook(name: str, url: str) -> CustomWebhookNotificationBlock:
    return CustomWebhookNotificationBlock(
        name=name,
        url=url,
        json_data={"subject": "{{subject}}", "body": "{{body}}"},
        headers={"Authorization": "Bearer {{token}}"},
        secrets={"token": TOKEN},
    )


def wait_for(happened: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)
    return found


def runs(client: SyncPrefectClient, deployed: UUID) -> list[Any]:
    return client.read_flow_runs(deployment_filter=DeploymentFilter(id={"any_": [deployed]}))


def test_a_failure_and_a_wait_are_told_with_their_message(
    client: SyncPrefectClient, deployed: UUID, received: tuple[str, list[dict[str, Any]]]
) -> None:
    run = client.create_flow_run_from_deployment(deployed, name="tuesday")
    client.set_flow_run_state(run.id, Suspended(timeout_seconds=60), force=True)
    wait_for(lambda: received[1])
    assert ended(str(run.id)) is None
    client.set_flow_run_state(run.id, Failed(message="The disk is full."), force=True)
    assert ended(str(run.id)) == "failed"
    wait_for(lambda: len(received[1]) == 2)
    waits, failed = received[1]
    assert waits["subject"] == "tuesday waits for approval"
    assert failed["subject"] == "tuesday failed"
    assert failed["body"].startswith("The disk is full.")
    assert f"/runs/flow-run/{run.id}" in failed["body"]
    client.delete_flow_run(run.id)
    assert ended(str(run.id)) is None


def test_a_suspended_run_that_is_cancelled_has_ended(client: SyncPrefectClient, deployed: UUID) -> None:
    run = client.create_flow_run_from_deployment(deployed)
    client.set_flow_run_state(run.id, Suspended(timeout_seconds=60), force=True)
    client.set_flow_run_state(run.id, State(type=StateType.CANCELLING))  # as Prefect's UI does
    assert ended(str(run.id)) == "cancelled"
    client.delete_flow_run(run.id)


def test_a_new_champion_is_told(deployed: UUID, received: tuple[str, list[dict[str, Any]]]) -> None:
    @flow
    def promoting() -> None:
        events.champion_changed("other-policy", 4, "It is another model.")
        events.champion_changed("told-policy", 3, "It wins.")

    promoting()
    # The run that the test before suspended may be told of now.
    told = wait_for(lambda: [message for message in received[1] if message["subject"].endswith("serves")])
    assert told == [{"subject": "told-policy version 3 serves", "body": "It wins."}]


def test_changes_that_others_see_start_a_run_and_the_own_ones_none(client: SyncPrefectClient, deployed: UUID) -> None:
    def download(revision: str, cached: bool) -> None:
        ref = StageRef("download", "f", "d" * 64, "/tmp", cached, 1.0, {"revision": revision})
        assets.materialised(ref, [], {"source": SET})

    @flow
    def part() -> None:
        download("new-to-this-run", cached=False)

    @flow
    def retraining(config: dict[str, Any], only_if_new: bool) -> str:
        part()
        return events.sender()

    @flow
    def other() -> None:
        download("known", cached=True)
        download("r2", cached=False)

    @flow
    def writer() -> None:
        emit_event(assets.MATERIALISED, {"prefect.resource.id": "dataset://of/nobody"})
        emit_event(assets.MATERIALISED, {"prefect.resource.id": f"dataset://{SET}"})

    def by(title: str) -> list[Any]:
        made = [run for run in runs(client, deployed) if run.created_by is not None]
        return [run for run in made if run.created_by.display_value == f"retrain/told: {title}"]

    revision, written = "a new revision of a set starts a run", "a set that others write starts a run"
    own = client.create_flow_run_from_deployment(deployed)
    assert run_flow(retraining, flow_run=own) == str(deployed)
    other()
    writer()
    wait_for(lambda: by(revision))
    for later in range(4):  # the server takes two events at a time: those that should start none come before these
        wait_for(lambda known=later: len(by(written)) > known)
        emit_event(assets.MATERIALISED, {"prefect.resource.id": assets.data_key(SET, f"later-{later}")})
    wait_for(lambda: len(by(written)) > 4)
    started = by(revision) + by(written)
    assert len(started) == 1 + 5
    assert all(run.parameters["only_if_new"] is True for run in started)

    @flow
    def beginning(config: dict[str, Any], only_if_new: bool) -> None:
        cancel_covered()

    resumed = started.pop()
    client.set_flow_run_state(resumed.id, Running(), force=True)
    client.set_flow_run_state(resumed.id, Suspended(timeout_seconds=60), force=True)
    client.resume_flow_run(resumed.id)  # approved, and no worker has taken it up yet
    by_hand = client.create_flow_run_from_deployment(deployed)
    changed = client.create_flow_run_from_deployment(deployed, parameters={"only_if_new": False})
    run_flow(beginning, flow_run=changed)
    assert all(client.read_flow_run(run.id).state.is_scheduled() for run in started)  # they would do something else
    run_flow(beginning, flow_run=started[0])
    first, second, other_ = (client.read_flow_run(run.id).state for run in (*started[:2], by_hand))
    assert first.is_completed()
    assert second.is_cancelled()
    assert f"The run {started[0].name} began after this" in second.message
    assert other_.is_scheduled()
    assert client.read_flow_run(resumed.id).state.name == "Resuming"


def test_a_champion_below_its_gate_starts_a_run_in_any_case(client: SyncPrefectClient, deployed: UUID) -> None:
    missed = GateResult("tokens", "tokens per answer", "<= 60", False, 70.0, 66.0, 74.0, {})

    @flow
    def measuring() -> None:
        events.champion_below_gate("told-policy", 3, [missed])

    known = {run.id for run in runs(client, deployed)}
    measuring()
    (started,) = wait_for(lambda: [run for run in runs(client, deployed) if run.id not in known])
    assert started.parameters["only_if_new"] is False
    assert started.parameters["config"]["name"] == "told"


def test_a_notification_that_is_refused_keeps_its_token_out_of_the_log(
    client: SyncPrefectClient, deployed: UUID, request_: deployments.Request, received: Any, prefect_home: Path
) -> None:
    webhook("refused", f"{received[0]}/nobody").save("refused")
    refused = deployments.deploy(replace(request_, name="refused", notify=("custom-webhook/refused",)))
    run = client.create_flow_run_from_deployment(refused)
    client.set_flow_run_state(run.id, Failed(message="?"), force=True)
    log = prefect_home / "server.log"
    wait_for(lambda: "403" in log.read_text())
    assert TOKEN not in log.read_text()


def test_a_deployment_without_them_takes_its_automations_away(
    client: SyncPrefectClient, request_: deployments.Request, deployed: UUID
) -> None:
    def titles() -> list[str]:
        return [title for title in TITLES if client.read_automations_by_name(f"retrain/told: {title}")]

    assert titles() == list(TITLES)
    plain = replace(request_, notify=(), on_events=False)
    assert deployments.deploy(plain) == deployed
    assert titles() == [*TITLES[:2], "a run that nobody decided on goes on"]


def test_a_block_that_is_not_there_is_named_before_anything_is_deployed(
    client: SyncPrefectClient, request_: deployments.Request
) -> None:
    Secret(value="x").save("plain")
    for slug in ("slack-webhook/team", "secret/plain", "team"):
        with pytest.raises(ConfigError, match=f"--notify {slug}: .* there are custom-webhook/.*team; make one"):
            deployments.deploy(replace(request_, name="never", notify=(slug,)))
    assert client.read_deployments(deployment_filter=DeploymentFilter(name={"any_": ["never"]})) == []


def test_the_runs_of_a_schedule_are_there_before_they_are_due(
    client: SyncPrefectClient, request_: deployments.Request
) -> None:
    asked = replace(request_, name="scheduled", cron="0 2 * * *", timezone="Europe/Berlin", notify=(), on_events=False)
    known = deployments.deploy(asked)
    wait_for(lambda: runs(client, known))
    berlin = ZoneInfo("Europe/Berlin")
    due = sorted(run.expected_start_time.astimezone(berlin) for run in runs(client, known))
    assert {(time.hour, time.minute) for time in due} == {(2, 0)}
    assert 0 < (due[0] - datetime.now(berlin)).total_seconds() <= 25 * 3600


@pytest.mark.parametrize(
    ("overlap", "becomes"),
    [("queue", ("SCHEDULED", "AwaitingConcurrencySlot")), ("cancel", ("CANCELLED", "Cancelled"))],
)
def test_a_run_that_is_due_while_another_runs(
    client: SyncPrefectClient, request_: deployments.Request, overlap: Any, becomes: tuple[str, str]
) -> None:
    known = deployments.deploy(replace(request_, name=overlap, overlap=overlap, notify=(), on_events=False))
    first, second = (client.create_flow_run_from_deployment(known) for _ in range(2))
    assert client.set_flow_run_state(first.id, Pending()).state.type.value == "PENDING"
    state = client.set_flow_run_state(second.id, Pending()).state
    assert (state.type.value, state.name) == becomes


def test_a_run_that_nobody_decides_on_is_reminded_of_and_goes_on_though_the_deployment_is_renewed(
    client: SyncPrefectClient, request_: deployments.Request, received: tuple[str, list[dict[str, Any]]]
) -> None:
    short = {"approval": "manual", "approval_hours": 1e-4, "reminder_hours": 1e-4}
    config = deployments.absolute(parse({"name": "asked", "promote": short}))
    asked = replace(request_, name="asked", config=config, on_events=False)
    deployed = deployments.deploy(asked)
    made = {entry.name: entry.id for entry in client.read_automations() if entry.name.startswith("retrain/asked: ")}
    run = client.create_flow_run_from_deployment(deployed, name="wednesday")
    client.set_flow_run_state(run.id, Running(), force=True)
    state = Suspended(pause_key="approve-asked-policy-1")
    keys = state.state_details.run_input_keyset = keyset_from_paused_state(state)
    client.set_flow_run_state(run.id, state, force=True)
    Approval.save(keys, run.id)
    time.sleep(3)
    deployments.deploy(asked)
    again = {entry.name: entry.id for entry in client.read_automations() if entry.name.startswith("retrain/asked: ")}
    assert again == made  # so their clocks tick on
    wait_for(lambda: client.read_flow_run(run.id).state.name == "Resuming", 60)
    assert decided(Approval.load(keys, run.id)).decision == "undecided"
    wait_for(lambda: "wednesday still waits for approval" in [message["subject"] for message in received[1]])
    client.delete_flow_run(run.id)
    deployments.deploy(replace(asked, notify=()))
    left = {entry.name for entry in client.read_automations() if entry.name.startswith("retrain/asked: ")}
    assert made.keys() - left == {name for name in made if name.endswith((" told", " told again"))}
