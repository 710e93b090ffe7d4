"""A candidate that waits for a person, through `rlhf serve` and a restart of Prefect's server."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import servers
from infra.machine import free_port
from infra.owned import processes_with
from tasks import history, tracking
from tests.api import ask, run_of, start, states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MANUAL = ("--set", "promote.approval=manual")


class Restarted:
    """A Prefect server that is stopped and started again, at the same address on the same database."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.start()

    def start(self) -> None:
        self.server = servers.prefect_server(log=self.home / "restarted.log", port=self.port)
        self.api = self.server.wait_ready()

    def restart(self) -> None:
        self.server.stop()
        self.start()


@pytest.fixture(scope="module")
def server(prefect_home: Path) -> Iterator[Restarted]:
    made = Restarted(prefect_home)
    yield made
    made.server.stop()


@pytest.fixture(scope="module")
def served(command: Callable[..., Any], folder: Path, server: Restarted) -> Iterator[Any]:
    serving = command("serve", str(folder / "tiny.yaml"), "--name", "asked", *MANUAL, api=server.api)
    serving.wait_for(lambda: ask(server.api, "deployments/filter", deployments={"name": {"any_": ["asked"]}}))
    yield serving
    serving.process.terminate()
    assert serving.end().left == []


def suspended(served: Any, api: str, run_id: str) -> None:
    """Waits until a run waits, and has no process."""
    served.wait_for(lambda: run_of(api, run_id)["state_name"] == "Suspended", 500)
    served.wait_for(lambda: not processes_with("PREFECT__FLOW_RUN_ID", run_id), 30)


def answer(api: str, run_id: str, **form: str) -> Any:
    """What the form in Prefect's UI sends."""
    return ask(api, f"flow_runs/{run_id}/resume", run_input=form)


def ended(served: Any, api: str, run_id: str) -> dict[str, Any]:
    served.wait_for(lambda: run_of(api, run_id)["state_type"] in ("COMPLETED", "FAILED", "CRASHED"), 300)
    return run_of(api, run_id)


def test_approved_after_a_restart_of_the_server(served: Any, server: Restarted, folder: Path, rlhf: Any) -> None:
    run_id = start(server.api, "asked")
    suspended(served, server.api, run_id)
    store = tracking.open_store(folder / "workspace")
    assert tracking.alias(store, "tiny-policy", "champion") is None
    assert tracking.find_version(store, "tiny-policy", 1).tags["approval"].startswith("waiting: http")
    server.restart()
    assert run_of(server.api, run_id)["state_name"] == "Suspended"
    refused = answer(server.api, run_id, decision="perhaps")
    assert refused["status"] == "REJECT"
    assert answer(server.api, run_id, decision="approve", comment="reads well", name="Ann")["status"] == "ACCEPT"
    began = time.monotonic()
    assert ended(served, server.api, run_id)["state_type"] == "COMPLETED"
    print(f"from the answer to the end: {time.monotonic() - began:.0f} s")
    champion = tracking.alias(store, "tiny-policy", "champion")
    assert champion is not None
    assert champion.version == 1
    (move,) = history.moves(store, "tiny-policy")
    assert (move.by, move.kind) == ("Ann", history.PROMOTION)
    assert move.why.endswith("; Ann approved it (reads well).")
    assert list((folder / "workspace" / "approvals").iterdir()) == []
    names = [state["name"] for state in states(server.api, run_id)]
    assert [name for name in names if name in ("Suspended", "Completed")] == ["Suspended", "Completed"]
    client = tracking.connect(store.uri)
    (run,) = client.search_runs([store.experiment_id], f"tags.`prefect.flow_run_id` = '{run_id}'")
    assert run.info.status == "FINISHED"


def test_rejected_and_undecided(served: Any, server: Restarted, folder: Path) -> None:
    (deployment,) = ask(server.api, "deployments/filter", deployments={"name": {"any_": ["asked"]}})
    config = deployment["parameters"]["config"]
    config["ppo"] |= {"kl_coef": 0.2}
    run_id = start(server.api, "asked", config=config)
    suspended(served, server.api, run_id)
    answer(server.api, run_id, decision="reject", comment="too curt", name="Bo")
    again = start(server.api, "asked", config=config, only_if_new=False)
    assert ended(served, server.api, run_id)["state_type"] == "COMPLETED"
    store = tracking.open_store(folder / "workspace")
    rejected = tracking.find_version(store, "tiny-policy", 2).tags
    assert "stays a candidate, it passes its gates" in rejected["verdict"]
    assert "but Bo rejected it (too curt)" in rejected["verdict"]
    suspended(served, server.api, again)
    answer(server.api, again)  # an empty form, as the automation sends it when the time is over
    assert ended(served, server.api, again)["state_type"] == "COMPLETED"
    assert "but nobody decided in time" in tracking.find_version(store, "tiny-policy", 2).tags["verdict"]
    champion = tracking.alias(store, "tiny-policy", "champion")
    assert champion is not None
    assert champion.version == 1


def test_a_plain_run_says_how_to_promote(served: Any, rlhf: Callable[..., Any], server: Restarted) -> None:
    done = rlhf("run", *MANUAL, "--set", "ppo.kl_coef=0.2", api=server.api).end()
    assert done.code == 0, done.output
    said = " ".join(done.output.split())
    assert "a run without a deployment cannot wait for one" in said
    assert 'Promote it with `rlhf promote tiny-policy 2 --why "..."`' in said
