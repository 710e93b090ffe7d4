"""Runs the flow of `counting` in the three ways that `retrain` runs:

    python run_counting.py script FOLDER LAUNCH    as `rlhf run` does, in this process
    python run_counting.py serve NAME              as `rlhf serve` does
    python run_counting.py deploy NAME POOL        as `rlhf deploy` does, for `prefect worker start --pool POOL`

LAUNCH is the JSON of a Launch; a run of the deployment takes it and FOLDER as its parameters.
"""

import json
import os
import sys
from pathlib import Path
from uuid import UUID

from counting import counting, deployment
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows import automations, deployments, local
from tasks.config import PromoteConfig


def renew(client: SyncPrefectClient, known: UUID, name: str) -> None:
    """Makes the automations that watch over the runs of a deployment."""
    rest = {"model": "counting", "sources": [], "on_events": False, "blocks": [], "waits": PromoteConfig()}
    automations.renew(client, known, name, **rest)


def main(how: str, *arguments: str) -> None:
    """See the module's docstring."""
    api = os.environ["PREFECT_API_URL"]
    if how == "script":
        folder, fields = arguments
        with local.terminated_in_order(), local.PrefectServer(Path(folder)) as server, server.connected():
            counting(folder, json.loads(fields))
    elif how == "serve":
        with local.terminated_in_order():
            deployments.serve_supervised([sys.executable, __file__, "runner", *arguments], api)
    elif how == "runner":
        deployments.start_runs(deployment(*arguments), lambda client, known: renew(client, known, *arguments))
    elif how == "deploy":
        name, pool = arguments
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            renew(client, deployment(name, pool).apply(), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
