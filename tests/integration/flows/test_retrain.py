"""What a run does that starts again, and one whose stages are all there: the flow, on a Prefect server, without its
stages."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow
from prefect.states import Crashed, Running, Scheduled

from flows import retrain as module
from flows.alone import alone
from flows.retrain import Outcome, retrain
from tasks import plan, stages, tracking, unfinished
from tasks.approval import Waiting
from tasks.config import RunConfig, parse
from tasks.gates import GateResult
from tasks.promote import Judgement, terms
from tasks.register import Registration, registration_stage
from tasks.stages import Stage, StageRef
from tasks.steps import Run

TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "vocab_size": 400, "positions": 512}
MISSED = GateResult("win_rate_vs_champion", "win rate", ">= 0.52", False, 0.5, 0.4, 0.6, {})


class Steps:
    """Stands for the steps after registration: the candidate misses its gate."""

    def __init__(self, refs: Mapping[str, StageRef]) -> None:
        self.refs = refs
        self.begun = 0
        self.ends: BaseException | None = None
        """What ends them while the candidate is compared with the champion."""

    def __call__(self, run: Run, outcome: Outcome) -> Iterator[None]:
        self.begun += 1
        if self.ends is not None:
            raise self.ends
        made = Registration("unit-policy", 1, "unit-reward", 1, None, None, "", True)
        judgement = Judgement([MISSED], None, terms(run.config, self.refs))
        module._decide(run, outcome, Waiting({}, made, judgement, run.run_id))
        yield


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "unit",
        "workspace": str(tmp_path / "workspace"),
        "data": {"demo": {"pairs": 200}},
        "models": {"policy": TINY},
    }


@pytest.fixture
def config(tree: dict[str, Any]) -> RunConfig:
    return parse(tree)


@pytest.fixture
def steps(config: RunConfig, prefect: str, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Of runs whose stages are finished and whose models are registered."""

    def work(directory: Path) -> dict[str, Any]:
        (directory / "out").write_text(directory.parent.name)
        return {}

    workspace = Path(config.workspace)
    refs = {name: stages.run(Stage(name, workspace, {}, {}, ()), work) for name in ("reward", "ppo", "evaluate")}
    stages.run(registration_stage(config, refs), work)
    store = tracking.open_store(workspace)
    for model, stage in (("unit-policy", "ppo"), ("unit-reward", "reward")):
        tracking.register_version(store, model, workspace, None, {"digest": refs[stage].digest})
    found = Steps(refs)
    monkeypatch.setattr(plan, "finished", lambda config: refs)
    monkeypatch.setattr(module, "_steps", found)
    return found


def scheduled(config: RunConfig, **choice: str) -> str:
    """The message of a run as a schedule starts it, or by its form with a choice."""
    state = retrain(config, **choice, only_if_new=True, return_state=True)
    assert isinstance(state, State)
    return str(state.message)


def test_a_candidate_is_judged_by_the_next_run_if_its_own_could_not(
    config: RunConfig, tree: dict[str, Any], steps: Steps
) -> None:
    steps.ends = ConnectionError("the judge gives no answer")
    assert "the judge gives no answer" in scheduled(config)
    steps.ends = None
    assert "Nothing new" not in scheduled(config)
    nothing = "Nothing new: data, config and code are those of unit-policy version 1, which was judged by these gates."
    assert scheduled(config) == nothing
    assert steps.begun == 2
    for choice in ({"force": "ppo"}, {"until": "promote"}):
        assert "Nothing new" not in scheduled(config, **choice)
    lower = parse(tree | {"promote": {"gates": {"win_rate_vs_champion": ">= 0.4"}}})
    assert "Nothing new" not in scheduled(lower)
    assert "Nothing new" in scheduled(lower)
    assert steps.begun == 5


def crashed(config: RunConfig, times: int) -> FlowRun:
    """A run that crashed so often, and left an MLflow run each time as a kill leaves it; it is scheduled again."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(
            retrain, parameters={"config": config.model_dump(mode="json"), "only_if_new": True}
        )
        for _ in range(times):
            client.set_flow_run_state(run.id, Running(), force=True)
        client.set_flow_run_state(run.id, Crashed(), force=True)
        client.set_flow_run_state(run.id, Scheduled(name="Rescheduled"), force=True)
        return client.read_flow_run(run.id)


def left_by(config: RunConfig, flow_run_id: str) -> tuple[str, str]:
    """The MLflow runs of a flow run that was killed and of its stage, with the file of its lock."""
    workspace = Path(config.workspace)
    store = tracking.open_store(workspace)
    run_id = tracking.start_run(store, config, {tracking.FLOW_RUN: flow_run_id})
    (workspace / "running").mkdir(exist_ok=True)
    (workspace / "running" / f"{flow_run_id}.lock").touch()
    return run_id, tracking.stage_run(store, run_id, "ppo", workspace / flow_run_id)


def statuses(config: RunConfig) -> dict[str, str]:
    store = tracking.open_store(Path(config.workspace))
    runs = tracking.connect(store.uri).search_runs([store.experiment_id])
    return {run.info.run_id: run.info.status for run in runs}


def test_a_run_that_starts_again_goes_on_with_its_mlflow_run(config: RunConfig, steps: Steps) -> None:
    scheduled(config)
    known = statuses(config)
    again = crashed(config, times=5)
    run_id, stage = left_by(config, str(again.id))
    run_flow(retrain, flow_run=again)
    assert steps.begun == 2, "it tells what it came to, though the candidate has its verdict"
    assert statuses(config) == known | {run_id: "FINISHED", stage: "KILLED"}


def test_a_run_that_starts_again_by_another_version_of_its_base_has_a_run_of_its_own(
    tree: dict[str, Any], config: RunConfig, steps: Steps
) -> None:
    again = crashed(config, times=1)
    first, _ = left_by(parse(tree | {"models": {"policy": TINY | {"layers": 2}}}), str(again.id))
    run_flow(retrain, flow_run=again)
    found = statuses(config)
    assert found.pop(first) == "KILLED"
    assert sorted(found.values()) == ["FINISHED", "KILLED"]


def test_a_run_that_crashed_once_more_has_ended(config: RunConfig, steps: Steps) -> None:
    workspace = Path(config.workspace)
    run = crashed(config, times=6)
    run_id, _ = left_by(config, str(run.id))
    unfinished.note(workspace, str(run.id), workspace / "ppo")
    with pytest.raises(RuntimeError, match="The run started again 5 times without coming to its end"):
        run_flow(retrain, flow_run=run)
    assert steps.begun == 0
    assert statuses(config)[run_id] == "FAILED"
    assert list((workspace / "unfinished").iterdir()) == []


def test_what_a_killed_run_left_running_is_ended_by_the_next(config: RunConfig, steps: Steps) -> None:
    dead, its_stage = left_by(config, "dead")
    alive, _ = left_by(config, "alive")
    elsewhere, _ = left_by(config, "elsewhere")
    (Path(config.workspace) / "running" / "elsewhere.lock").unlink()
    with alone(Path(config.workspace), "alive"):
        scheduled(config)
    found = statuses(config)
    assert [found[run_id] for run_id in (dead, its_stage, alive, elsewhere)] == ["KILLED"] * 2 + ["RUNNING"] * 2
