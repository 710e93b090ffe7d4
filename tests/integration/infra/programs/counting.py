"""A flow of one step, whose ranks count."""

import os
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.deployments.runner import EntrypointType, RunnerDeployment

from infra import launch
from infra.launchers import Launch
from infra.witness import witnessed

HERE = Path(__file__).parent


@task(cache_policy=NO_CACHE, persist_result=False)
def count(folder: str, fields: dict[str, Any]) -> None:
    """A step, called directly as those of `tasks.train` are."""
    outcome = launch.run(
        "counting_rank",
        [folder],
        log=Path(folder, "log"),
        launch=Launch(**fields),
        env={"PYTHONPATH": f"{HERE}:{os.environ['PYTHONPATH']}", "RLHF_TEST_RANKS": Path(folder).name},
    )
    if outcome.exit_code:
        raise RuntimeError(f"count ended with exit code {outcome.exit_code}")


@flow(persist_result=False)
def counting(folder: str, fields: dict[str, Any]) -> None:
    """Launches the ranks."""
    with witnessed():
        count(folder, fields)


def deployment(name: str, pool: str | None = None) -> RunnerDeployment:
    """What `flows.deployments.deployment` makes of `retrain`."""
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    made = counting.to_deployment(
        name,
        work_pool_name=pool,
        job_variables={"working_dir": str(HERE), "env": environment} if pool else None,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)
    return made
