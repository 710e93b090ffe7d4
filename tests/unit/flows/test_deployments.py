import json
from pathlib import Path
from typing import Any

import pytest

from flows.deployments import Request, absolute, deployment
from tasks import dag
from tasks.config import ConfigError, parse


def request(**changes: Any) -> Request:
    return Request(**{"name": "nightly", "config": absolute(parse({"name": "chat"})), **changes})


def test_paths_are_absolute_as_a_run_may_start_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    tree = {
        "workspace": "here",
        "models": {"policy": "model", "reward": "models:/chat-reward@champion"},
        "data": {"sources": {"ours": {"path": "pairs.jsonl"}}, "unsupervised": {"path": "books"}},
    }
    made = absolute(parse(tree))
    assert made["workspace"] == str(tmp_path / "here")
    assert made["models"]["policy"] == str(tmp_path / "model")
    assert made["models"]["reward"] == "models:/chat-reward@champion"
    assert made["data"]["sources"]["ours"]["path"] == str(tmp_path / "pairs.jsonl")
    assert made["data"]["unsupervised"]["path"] == str(tmp_path / "books")
    assert made["data"]["hub"] is None
    assert parse(made).model_dump(mode="json") == made


def test_its_runs_have_the_stages_of_a_run_by_hand() -> None:
    config = parse({"name": "chat", "data": {"demo": {}}})
    by_hand, deployed = (
        {node.key: json.dumps(node.config) for node in dag.graph(run).values()}
        for run in (config, parse(absolute(config)))
    )
    assert by_hand == deployed


def test_a_deployment_starts_a_module_by_schedule_one_run_at_a_time() -> None:
    made = deployment(request(cron="0 2 * * *", timezone="Europe/Berlin", overlap="cancel", pool="gpu"))
    assert made.entrypoint == "flows.retrain.retrain"
    assert made.work_pool_name == "gpu"
    assert (made.concurrency_limit, made.concurrency_options.collision_strategy.value) == (1, "CANCEL_NEW")
    (schedule,) = made.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 2 * * *", "Europe/Berlin")
    assert made.parameters["only_if_new"] is True
    assert made.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "60"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cron": "every night"}, "--cron 'every night', --timezone UTC: Invalid cron"),
        ({"cron": "0 2 * * *", "timezone": "Middle/Earth"}, "--timezone Middle/Earth: Invalid timezone"),
    ],
)
def test_a_schedule_that_is_none(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deployment(request(**wrong))
