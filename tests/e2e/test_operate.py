"""What the engineer who schedules retraining types once: the blocks into Prefect, a deployment with its schedule."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml

from infra import servers
from infra.shipped import SHIPPED
from tasks.config import parse

pytestmark = pytest.mark.slow
Rlhf = Callable[..., Any]
SHIPPED_FILE = Path(__file__).parents[2] / "infra" / "prefect.yaml"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server of its own: what is deployed here shall start at no event of another test."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with servers.prefect_server(log=home / "server.log") as server:
            yield server.wait_ready()


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_the_blocks_of_the_repo_are_saved_by_one_command(command: Rlhf, folder: Path, api: str) -> None:
    workspace = ("--workspace", str(folder / "workspace"))
    listed = command("infra", "list", *workspace, api=api).end()
    assert states(listed.output) == dict.fromkeys(SHIPPED, "shipped")
    saved = command("infra", "register", *workspace, api=api).end()
    assert saved.code == 0, saved.output
    listed = command("infra", "list", *workspace, api=api).end()
    assert states(listed.output) == dict.fromkeys(SHIPPED, "saved")


def states(output: str) -> dict[str, str]:
    """Name -> saved or shipped, as `rlhf infra list` tells."""
    return dict(re.findall(r"^(\S+) .*\b(saved|shipped) *$", output, re.MULTILINE))


def test_a_deployment_has_its_schedule_pool_and_automations(rlhf: Rlhf, api: str) -> None:
    schedule = ("--cron", "0 2 * * *", "--timezone", "Europe/Berlin")
    ended = rlhf("deploy", "--name", "nightly", *schedule, "--pool", "gpu", "--overlap", "cancel", api=api).end()
    assert ended.code == 0, ended.output
    made = ask(f"{api}/deployments/name/retrain/nightly")
    (due,) = (entry["schedule"] for entry in made["schedules"] if entry["active"])
    assert (due["cron"], due["timezone"]) == ("0 2 * * *", "Europe/Berlin")
    assert (made["entrypoint"], made["work_pool_name"]) == ("flows.retrain.retrain", "gpu")
    assert made["global_concurrency_limit"]["limit"] == 1
    assert made["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert made["parameters"]["only_if_new"] is True
    assert ask(f"{api}/work_pools/gpu")["type"] == "process"
    names = [automation["name"] for automation in ask(f"{api}/automations/filter", {})]
    assert len(names) == len(set(names)) > 0
    again = rlhf("deploy", "--name", "nightly", "--pool", "gpu", "--no-events", api=api).end()
    assert again.code == 0, again.output
    renewed = ask(f"{api}/deployments/name/retrain/nightly")
    assert renewed["id"] == made["id"]
    assert renewed["schedules"] == []
    assert set(names) > {automation["name"] for automation in ask(f"{api}/automations/filter", {})}


def test_prefect_deploy_makes_of_the_shipped_file_what_rlhf_deploy_makes(
    command: Rlhf, tmp_path: Path, api: str
) -> None:
    tree = yaml.safe_load(SHIPPED_FILE.read_text())
    (shipped,) = tree["deployments"]
    assert tree["prefect-version"] == prefect.__version__
    config = tmp_path / "shipped.yaml"
    config.write_text(yaml.safe_dump(shipped["parameters"]["config"]))
    ended = command(
        "deploy", str(config), "--name", "ours", "--cron", "0 2 * * *", "--pool", "gpu", "--no-events", api=api
    ).end()
    assert ended.code == 0, ended.output
    by_prefect = subprocess.run(
        [Path(sys.executable).with_name("prefect"), "--no-prompt", "deploy", "--prefect-file", SHIPPED_FILE, "--all"],
        cwd=SHIPPED_FILE.parents[1],
        env={**os.environ, "PREFECT_API_URL": api},
        capture_output=True,
        text=True,
    )
    assert by_prefect.returncode == 0, by_prefect.stdout + by_prefect.stderr
    made, ours = (ask(f"{api}/deployments/name/retrain/{name}") for name in (shipped["name"], "ours"))
    assert same(made) == same(ours)


def same(made: dict[str, Any]) -> dict[str, Any]:
    """Of a deployment, what is to be the same however it was made; a workspace is absolute by `rlhf deploy` alone."""
    config = parse(made["parameters"]["config"]).model_dump(mode="json")
    return {
        "entrypoint": made["entrypoint"],
        "schema": made["parameter_openapi_schema"],
        "pool": made["work_pool_name"],
        "schedules": [(entry["schedule"], entry["active"]) for entry in made["schedules"]],
        "limit": made["global_concurrency_limit"]["limit"],
        "overlap": made["concurrency_options"]["collision_strategy"],
        "environment": made["job_variables"]["env"],
        "tags": made["tags"],
        "parameters": {**made["parameters"], "config": {**config, "workspace": Path(config["workspace"]).name}},
    }
