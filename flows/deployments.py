"""Retraining by schedule or on demand: the deployment of `retrain`, and what watches over its runs.

    deploy(request)     on a work pool, whose workers start the runs: `prefect worker start --pool gpu`
    serve(request)      without a worker: this process starts them, in processes of their own, until it is stopped

A run that dies without a word (kill -9, the machine) is found and starts again: Prefect's server takes a run whose
heartbeats stop for crashed, and a crashed run is scheduled anew, as the same run, which goes on from its checkpoints;
after `retrain.MOST_RESTARTS` such starts it fails. This, starts by events and notifications are `flows.automations`.

Run as a program it serves the request of its one argument, a JSON object: `rlhf serve` starts it under a supervisor,
since Prefect's runner leaves the flows' processes behind when it is stopped.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError

from flows import automations
from flows.retrain import retrain
from infra.owned import OwnedProcess
from tasks.config import ConfigError, PromoteConfig, RunConfig
from tasks.stages import REPO

GRACE_SECONDS = 28.0
"""Of a served run: for its checkpoint (20 s) and for what Prefect does after it."""


@dataclass(frozen=True)
class Request:
    """What a deployment is to be; plain values, so that it can pass to another process."""

    name: str
    config: Mapping[str, Any]
    """The tree of a RunConfig whose paths are absolute, as a run may start in any folder."""
    cron: str | None = None
    timezone: str | None = None
    """Of `cron`, such as Europe/Berlin; None: UTC."""
    overlap: Literal["queue", "cancel"] = "queue"
    """What becomes of a run that is due while an earlier one of this deployment runs: it waits, or is cancelled."""
    only_if_new: bool = True
    """A run ends at once where data, config and code are those of a policy that has its verdict."""
    on_events: bool = True
    """A run also starts when a set changes or the champion falls below a gate."""
    notify: Sequence[str] = ()
    """Prefect's notification blocks that are told of failures, waiting for approval and new champions, as TYPE/NAME."""
    pool: str | None = None
    """Work pool; None with `serve`."""


def absolute(config: RunConfig) -> dict[str, Any]:
    """The tree of a config with its local paths made absolute."""
    tree = config.model_dump(mode="json")
    tree["workspace"] = _absolute(config.workspace)
    tree["data"]["hub"] = _absolute(config.data.hub)
    for name, source in config.data.sources.items():
        tree["data"]["sources"][name]["path"] = _absolute(source.path)
    if config.data.unsupervised is not None:
        tree["data"]["unsupervised"]["path"] = _absolute(config.data.unsupervised.path)
    for key in ("policy", "reward"):
        if isinstance(model := tree["models"][key], str) and Path(model).expanduser().is_dir():
            tree["models"][key] = _absolute(model)
    return tree


def deployment(request: Request) -> RunnerDeployment:
    """The deployment, not yet known to a server. Raises ConfigError for a schedule that is none."""
    strategy = {"queue": ConcurrencyLimitStrategy.ENQUEUE, "cancel": ConcurrencyLimitStrategy.CANCEL_NEW}
    try:
        schedule = CronSchedule(cron=request.cron, timezone=request.timezone or "UTC") if request.cron else None
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--cron {request.cron!r}, --timezone {request.timezone or 'UTC'}: {reason}") from None
    made = retrain.to_deployment(
        request.name,
        schedules=[schedule] if schedule else None,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=strategy[request.overlap]),
        parameters={"config": dict(request.config), "only_if_new": request.only_if_new},
        tags=[str(request.config["name"])],
        description="Retrains an aligned chat model: SFT, reward model, PPO; a better one becomes champion.",
        work_pool_name=request.pool,
        job_variables=_job_variables() if request.pool else None,
        entrypoint_type=EntrypointType.MODULE_PATH,  # a path would put flows/ first on sys.path
    )
    assert isinstance(made, RunnerDeployment)
    return made


def deploy(request: Request) -> UUID:
    """Make or renew the deployment on its work pool, which is made (type process) if there is none of that name."""
    assert request.pool is not None, "a deployment without a work pool is served"
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(request.pool)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=request.pool, type="process"))
        blocks = _notified(client, request)
        known = deployment(request).apply()
        assert isinstance(known, UUID)
        _renew_automations(client, known, request, blocks)
    return known


def serve(request: Request) -> None:
    """Start the runs of the deployment in processes of this one until it is stopped."""
    start_runs(
        deployment(request),
        lambda client, known: _renew_automations(client, known, request, _notified(client, request)),
    )


def start_runs(made: RunnerDeployment, renew: Callable[[SyncPrefectClient, UUID], None]) -> None:
    """Start the runs of a deployment until this process is stopped, once its automations are renewed."""
    from prefect.runner import Runner

    runner = Runner(name=made.name, pause_on_shutdown=False, limit=1)
    known = runner.add_deployment(made)
    assert isinstance(known, UUID)
    with get_client(sync_client=True) as client:
        renew(client, known)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of a stop it shows the tracebacks of open connections
    with suppress(asyncio.CancelledError, KeyboardInterrupt):  # how a stop ends it
        asyncio.run(runner.start())


def serve_supervised(command: list[str], api_url: str) -> int:
    """Run a command that serves a deployment until it ends, and return its exit code.

    An exception here, such as that of a Ctrl-C, stops it: a run writes its checkpoint, and no process is left.
    """
    env = {"PREFECT_API_URL": api_url, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(automations.HEARTBEAT_SECONDS)}
    runner = OwnedProcess(command, env=env, output=sys.stdout.fileno(), grace_seconds=GRACE_SECONDS)
    try:
        while runner.exit_code is None:
            time.sleep(0.5)
    finally:
        runs = runner.values_of("PREFECT__FLOW_RUN_ID")  # a deployment of this name may have others, elsewhere
        code = runner.stop()
        if runs:
            tell_stopped(api_url, {UUID(run) for run in runs})
    return code


def tell_stopped(api_url: str, runs: Collection[UUID]) -> None:
    """Tell Prefect of the runs that ended with their runner, which had no time to: they have crashed, not run on.

    So they are scheduled again, and go on when the deployment is served the next time. One that the runner had just
    taken up, whose process was not there yet, is not known here: it stays Pending, and is to be started anew.
    """
    with temporary_settings({PREFECT_API_URL: api_url}), get_client(sync_client=True) as client:
        unended = FlowRunFilter(id={"any_": list(runs)}, state={"type": {"any_": ["RUNNING", "PENDING"]}})
        for run in client.read_flow_runs(flow_run_filter=unended):
            state = State(type=StateType.CRASHED, message="`rlhf serve` was stopped; the run goes on when it is back.")
            client.set_flow_run_state(run.id, state, force=True)


def check_notified(api_url: str, request: Request) -> None:
    """Raises ConfigError if Prefect has not the notification blocks that are to be told."""
    with temporary_settings({PREFECT_API_URL: api_url}), get_client(sync_client=True) as client:
        _notified(client, request)


def _notified(client: SyncPrefectClient, request: Request) -> list[UUID]:
    return [automations.notification_block(client, slug) for slug in request.notify]


def _renew_automations(client: SyncPrefectClient, deployment_id: UUID, request: Request, blocks: list[UUID]) -> None:
    automations.renew(
        client,
        deployment_id,
        request.name,
        model=str(request.config["name"]),
        sources=list(request.config["data"]["sources"]),
        on_events=request.on_events,
        blocks=blocks,
        waits=PromoteConfig.model_validate(request.config["promote"]),
    )


def _job_variables() -> dict[str, Any]:
    environment = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(automations.HEARTBEAT_SECONDS), "DO_NOT_TRACK": "1"}
    return {"working_dir": str(REPO), "env": environment}


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


if __name__ == "__main__":
    serve(Request(**json.loads(sys.argv[1])))
