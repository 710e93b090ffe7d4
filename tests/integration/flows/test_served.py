"""What Prefect is told when `rlhf serve` is stopped, with processes that stand in for the runner and its run."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Running

from flows import deployments


def test_a_stop_tells_of_the_runs_whose_processes_the_runner_had_alone(
    prefect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow
    def retraining() -> None: ...

    @flow
    def other() -> None: ...

    def interrupt(seconds: float) -> None:
        if (tmp_path / "started").exists():
            raise KeyboardInterrupt
        time.sleep(seconds / 10)

    with get_client(sync_client=True) as client:
        ours, others = (client.create_deployment(client.create_flow(made), "nightly") for made in (retraining, other))
        here, elsewhere, foreign = (
            client.create_flow_run_from_deployment(known, state=Running()) for known in (ours, ours, others)
        )
        starts_a_run = f"PREFECT__FLOW_RUN_ID={here.id} sh -c 'touch {tmp_path}/started; sleep 60'"
        monkeypatch.setattr(deployments, "time", SimpleNamespace(sleep=interrupt))
        with pytest.raises(KeyboardInterrupt):
            deployments.serve_supervised(["sh", "-c", starts_a_run], prefect)
        states = [client.read_flow_run(run.id).state for run in (here, elsewhere, foreign)]
    assert [state.type.value for state in states] == ["CRASHED", "RUNNING", "RUNNING"]
    assert "`rlhf serve` was stopped" in states[0].message
