"""`rlhf serve` and `rlhf deploy` on a real Prefect server: runs that are killed, repeated, stopped."""

import json
import os
import signal
import time
import urllib.error
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from infra.owned import processes_with
from tests.api import ask, run_of, start, states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS_TO_CLEAR = 30


def names(api: str, run_id: str) -> list[str]:
    """Of the states that a run has had, in order; one that a busy server set twice is named once."""
    return [name for name, _ in groupby(state["name"] for state in states(api, run_id))]


@pytest.fixture(scope="module")
def served(command: Callable[..., Any], folder: Path, prefect_api: str) -> Any:
    """`rlhf serve` on the session's server, which stays when it ends."""
    arguments = ("serve", str(folder / "tiny.yaml"), "--name", "nightly", "--set", "ppo.steps=8")
    serving = command(*arguments, "--cron", "0 2 1 1 *", api=prefect_api)
    serving.wait_for(lambda: ask(prefect_api, "deployments/filter", deployments={"name": {"any_": ["nightly"]}}))
    return serving


def test_a_killed_run_goes_on_from_its_checkpoint(served: Any, folder: Path, prefect_api: str) -> None:
    run_id = start(prefect_api, "nightly")
    served.wait_for(lambda: list((folder / "workspace" / "ppo").glob("*/checkpoints/latest.json")), 300)
    (flow,) = processes_with("PREFECT__FLOW_RUN_ID", run_id)[:1]
    os.kill(flow, signal.SIGKILL)
    kept = folder / "workspace" / "unfinished" / run_id  # what `rlhf prune` spares meanwhile
    noted = {line.split("/")[0] for line in kept.read_text().splitlines()}
    assert noted >= {"base", "tokenise", "sft", "reward", "ppo"}
    served.wait_for(lambda: run_of(prefect_api, run_id)["state_type"] == "COMPLETED", 400)
    assert run_of(prefect_api, run_id)["run_count"] == 2
    ended = [name for name in names(prefect_api, run_id) if name in ("Crashed", "Rescheduled", "Completed")]
    assert ended == ["Crashed", "Rescheduled", "Completed"]
    assert not kept.exists()
    (directory,) = (folder / "workspace" / "ppo").glob("*/manifest.json")
    rows = (directory.parent / "records" / "metrics.jsonl").read_text().splitlines()
    assert len({json.loads(row)["step"] for row in rows}) == 8


def test_a_run_with_nothing_new_ends_at_once(served: Any, prefect_api: str) -> None:
    run_id = start(prefect_api, "nightly")
    served.wait_for(lambda: run_of(prefect_api, run_id)["state_type"] == "COMPLETED", 100)
    run = run_of(prefect_api, run_id)
    assert run["state"]["message"].startswith("Nothing new: data, config and code")
    assert run["total_run_time"] < 30


def test_bad_parameters_are_refused_by_the_form(served: Any, prefect_api: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        start(prefect_api, "nightly", config={"name": "tiny", "ppo": {"steps": -1}})
    assert "-1" in refused.value.read().decode()


def test_a_stop_leaves_a_checkpoint_and_no_process(served: Any, folder: Path, prefect_api: str) -> None:
    run_id = start(prefect_api, "nightly", force="ppo", only_if_new=False)
    served.wait_for(lambda: list((folder / "workspace" / "ppo").glob("*/checkpoints/latest.json")), 200)
    started = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    ended = served.end()
    assert time.monotonic() - started < SECONDS_TO_CLEAR
    assert ended.code == 143, ended.output
    assert ended.left == []
    assert "Traceback" not in ended.output
    assert list((folder / "workspace" / "ppo").glob("*/checkpoints/latest.json"))
    assert names(prefect_api, run_id)[-2:] == ["Crashed", "Rescheduled"]  # it goes on at the next `rlhf serve`
