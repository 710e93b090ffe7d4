"""`rlhf deploy` and `rlhf serve`: retraining by schedule, on a work pool or by this machine alone."""

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli import console
from flows.cli.errors import Debug
from flows.cli.run import Config, Overrides

if TYPE_CHECKING:
    from flows.deployments import Request

Name = Annotated[str, typer.Option("--name", help="Of the deployment; one that has it already is renewed.")]
Cron = Annotated[
    str | None,
    typer.Option("--cron", help='When runs start, such as "0 2 * * *". Without it: when they are asked for.'),
]
Timezone = Annotated[str | None, typer.Option("--timezone", help="Of --cron, such as Europe/Berlin; UTC if not given.")]
Overlap = Annotated[
    Literal["queue", "cancel"],
    typer.Option("--overlap", help="A run that is due while an earlier one runs waits for it, or is cancelled."),
]
Always = Annotated[bool, typer.Option("--always", help="Run all steps even if data, config and code are unchanged.")]
Events = Annotated[
    bool,
    typer.Option("--events/--no-events", help="Runs also start when a set changes or the champion falls below a gate."),
]
Notify = Annotated[
    list[str] | None,
    typer.Option(
        "--notify",
        metavar="TYPE/NAME",
        help="Notification block of Prefect that is told of failures, waiting for approval and new champions, such as "
        "slack-webhook/team; may be given several times.",
    ),
]


def deploy(
    config: Config,
    name: Name = "retrain",
    pool: Annotated[
        str | None,
        typer.Option("--pool", help="Work pool; that of the infrastructure block if not given. Made if there is none."),
    ] = None,
    cron: Cron = None,
    timezone: Timezone = None,
    overlap: Overlap = "queue",
    always: Always = False,
    events: Events = True,
    notify: Notify = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Deploy the flow with a config on a work pool: runs start by schedule or from Prefect's form."""
    url = _server()
    request = _request(config, set_, name, cron, timezone, overlap, always, events, notify)
    os.environ["PREFECT_API_URL"] = url
    from dataclasses import replace

    from flows import deployments
    from infra import gpu

    pool = pool or gpu.resolve(str(request.config["infrastructure"])).work_pool
    if pool is None:
        raise ValueError(
            f"the infrastructure {request.config['infrastructure']} names no work pool; give one with --pool, or use "
            "`rlhf serve`, which needs none"
        )
    known = deployments.deploy(replace(request, pool=pool))
    say = console.console.print
    say(
        f"Deployed retrain/{name}{_when(request)}: {url.removesuffix('/api')}/deployments/deployment/{known}",
        soft_wrap=True,
    )
    _say_notified(request)
    say(f"Its runs are started by a worker: `prefect worker start --pool {pool}`.", soft_wrap=True)
    say(f"A run now: `prefect deployment run retrain/{name}`.", soft_wrap=True)


def serve(
    config: Config,
    name: Name = "retrain",
    cron: Cron = None,
    timezone: Timezone = None,
    overlap: Overlap = "queue",
    always: Always = False,
    events: Events = True,
    notify: Notify = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Start runs by schedule or from Prefect's form on this machine, without a worker, until Ctrl-C."""
    request = _request(config, set_, name, cron, timezone, overlap, always, events, notify)
    from pathlib import Path

    from flows import deployments, local

    say = console.console.print
    with local.terminated_in_order(), local.ui_servers(Path(str(request.config["workspace"])), None, None) as addresses:
        api_url = f"{addresses['Prefect']}/api"
        deployments.check_notified(api_url, request)
        command = [sys.executable, "-m", "flows.deployments", json.dumps(asdict(request))]
        for title, address in addresses.items():
            say(f"{title}: {address}", soft_wrap=True)
        _say_notified(request)
        say(f"Serving retrain/{name}{_when(request)}. [dim]Ctrl-C ends it; a run stops at a checkpoint.[/]")
        code = deployments.serve_supervised(command, api_url)
    raise ValueError(f"Prefect's runner ended with exit code {code}; what it said stands above")


def _request(
    config: Config,
    overrides: list[str] | None,
    name: str,
    cron: str | None,
    timezone: str | None,
    overlap: Literal["queue", "cancel"],
    always: bool,
    events: bool,
    notify: list[str] | None,
) -> "Request":
    """The deployment that is asked for, with all that can be said against it before a server is asked."""
    from tasks import dag
    from tasks.config import load

    parsed = load(config, overrides or ())
    dag.graph(parsed)
    from flows import deployments

    request = deployments.Request(
        name, deployments.absolute(parsed), cron, timezone, overlap, not always, events, tuple(notify or ())
    )
    deployments.deployment(request)
    return request


def _server() -> str:
    """The Prefect API that keeps deployments: a temporary server of ours would forget to start them."""
    from flows import local
    from infra import servers

    url = servers.configured_url() or servers.running_prefect_server(local.state_dir())
    if url is None:
        raise ValueError(
            "a deployment needs a Prefect server that stays: start `rlhf ui` or `prefect server start` and set "
            "PREFECT_API_URL, or use `rlhf serve`, which brings its own"
        )
    if not servers.healthy(f"{url.rstrip('/')}/health"):
        raise ValueError(f"the Prefect server {url} does not answer; start it, or correct PREFECT_API_URL")
    return url


def _when(request: "Request") -> str:
    return f" ({request.cron}, {request.timezone or 'UTC'})" if request.cron else ""


def _say_notified(request: "Request") -> None:
    if request.notify:
        what = "Told of failures, waiting for approval and new champions"
        console.console.print(f"{what}: {', '.join(request.notify)}.", soft_wrap=True)
