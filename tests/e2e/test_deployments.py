"""`rlhf serve` and `rlhf deploy` on a real Prefect server: runs that are killed, repeated, stopped."""

import json
import os
import signal
import time
import urllib.error
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.owned import processes_with
from infra.servers import mlflow_server
from tasks import tracking
from tasks.tracking.store import EXPERIMENT
from tests import canaries, judge
from tests.api import ask, run_of, start, states
from tests.canaries import CANARIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS_TO_CLEAR = 60  # the runner's grace is 28, then Prefect is told


def names(api: str, run_id: str) -> list[str]:
    """Of the states that a run has had, in order; one that a busy server set twice is named once."""
    return [name for name, _ in groupby(state["name"] for state in states(api, run_id))]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of an MLflow server."""
    folder = tmp_path_factory.mktemp("mlflow")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    with mlflow_server(store_uri=store, artifacts=folder / "artifacts", log=folder / "log") as server:
        yield server.wait_ready(), folder


@pytest.fixture(scope="module")
def asked() -> Iterator[judge.Server]:
    """A judge behind an API, which is also who hears the notifications."""
    server = judge.Server(lambda first, second, number: (200, "[[C]]"))
    yield server
    server.http.shutdown()


@pytest.fixture(scope="module")
def served(
    command: Callable[..., Any], folder: Path, prefect_api: str, mlflow: tuple[str, Path], asked: judge.Server
) -> Any:
    """`rlhf serve` on the session's server, which stays when it ends, in an environment full of secrets."""
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        CustomWebhookNotificationBlock(
            name="canary",
            url=asked.address,
            json_data={"messages": [{}, {"content": "<answer-a>\n{{subject}}\n</answer-a><answer-b>\n\n</answer-b>"}]},
            headers={"Authorization": "Bearer {{token}}"},
            secrets={"token": CANARIES["webhook"]},
        ).save("canary")
    api_judge = f"{{base_url: '{asked.address}', model: m, key_variable: JUDGE_KEY, calls_per_minute: 1.0e+6}}"
    arguments = ("serve", str(folder / "tiny.yaml"), "--name", "nightly", "--set", "ppo.steps=8")
    arguments += ("--set", "data.phases=[2, 4, 4]")  # no gold reward model, for time
    options = ("--set", f"evaluate.api_judge={api_judge}", "--notify", "custom-webhook/canary", "--cron", "0 2 1 1 *")
    with pytest.MonkeyPatch.context() as patch, (folder / "served.log").open("w") as output:
        for name, value in canaries.environment(mlflow[0]).items():
            patch.setenv(name, value)
        serving = command(*arguments, *options, api=prefect_api, output=output)
    serving.wait_for(lambda: ask(prefect_api, "deployments/filter", deployments={"name": {"any_": ["nightly"]}}))
    return serving


def test_a_killed_run_goes_on_from_its_checkpoint(
    served: Any, folder: Path, prefect_api: str, mlflow: tuple[str, Path]
) -> None:
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
    client = tracking.connect(mlflow[0])
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.data.tags[tracking.FLOW_RUN] == run_id
    stages = [run.data.tags["rlhf.stage"] for run in runs if run is not parent]
    assert sorted(stages) == ["base", "evaluate", "ppo", "reward", "sft"]


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
    run_id = start(prefect_api, "nightly", force="ppo")
    served.wait_for(lambda: list((folder / "workspace" / "ppo").glob("*/checkpoints/latest.json")), 200)
    started = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    ended = served.end()
    assert time.monotonic() - started < SECONDS_TO_CLEAR
    said = (folder / "served.log").read_text()
    assert ended.code == 143, said
    assert ended.left == []
    assert "Traceback" not in said
    assert list((folder / "workspace" / "ppo").glob("*/checkpoints/latest.json"))
    end = time.monotonic() + SECONDS_TO_CLEAR  # the server acts on the event when it comes to it
    while names(prefect_api, run_id)[-1] != "Rescheduled" and time.monotonic() < end:
        time.sleep(0.5)
    assert names(prefect_api, run_id)[-2:] == ["Crashed", "Rescheduled"]  # it goes on at the next `rlhf serve`


def test_no_secret_is_left_anywhere(
    served: Any, folder: Path, prefect_home: Path, mlflow: tuple[str, Path], asked: judge.Server
) -> None:
    keys = {request["key"] for request in asked.requests}
    assert keys == {f"Bearer {CANARIES['judge']}", f"Bearer {CANARIES['webhook']}"}, "the secrets were used"
    places = canaries.files([folder, prefect_home, mlflow[1]])
    for kind in ("manifest.json", "config.json", "report.json", "served.log", "prefect.db", "mlflow.db", "MLmodel"):
        assert any(place.endswith(kind) for place in places), kind
    assert canaries.found_in(places) == []
    assert canaries.found_in({"file": CANARIES["hub"].encode()}) == ["hub in file"]
