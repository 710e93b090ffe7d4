"""The steps that train and evaluate, as Prefect tasks: each starts the worker on the run's infrastructure.

Call them directly in the flow: a task that is submitted runs in a thread, where a cancel would reach nobody and the
worker's processes would be left behind.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import Completed

from tasks import api_judge, dag, gates, registered
from tasks.config import ConfigError
from tasks.launched import StageFailed
from tasks.stages import Stage, StageRef
from tasks.steps import STAGE, Run, Work, by_worker, made_here, make, tried_again
from tasks.tracking import Version
from tasks.watch import watcher

Refs = Mapping[str, StageRef]


def _is_worth_another_try(error: Any) -> bool:
    """A worker that was killed goes on from its checkpoint; lack of memory, NaN and mistakes in the config stay."""
    return isinstance(error, StageFailed) and error.again


DELAYS = [5, 60]
"""Seconds before a second and a third try."""
TRAINED: dict[str, Any] = {
    "retries": len(DELAYS),
    "retry_delay_seconds": DELAYS,
    "retry_condition_fn": tried_again(_is_worth_another_try, DELAYS),
    **STAGE,
}
EVALUATED: dict[str, Any] = {**TRAINED, "retries": 1}
"""Options of the tasks that train, and of those that only answer and score."""


@task(
    name="sft",
    task_run_name="SFT: train the policy",
    **TRAINED,
)
def sft(run: Run, refs: Refs) -> Any:
    """The policy, fine-tuned on preferred answers."""
    return make(run, "sft", refs)


@task(
    name="reward",
    task_run_name="reward model: train",
    **TRAINED,
)
def reward(run: Run, refs: Refs) -> Any:
    """The reward model, trained on pairs."""
    return make(run, "reward", refs)


@task(
    name="gold",
    task_run_name="gold reward model: train",
    **TRAINED,
)
def gold(run: Run, refs: Refs) -> Any:
    """A second reward model, trained on pairs of its own, that PPO never sees."""
    return make(run, "gold", refs)


@task(
    name="ppo",
    task_run_name="PPO: train policy and critic",
    **TRAINED,
)
def ppo(run: Run, refs: Refs) -> Any:
    """The policy, trained with PPO on the reward model's score."""
    return make(run, "ppo", refs)


@task(
    name="evaluate",
    task_run_name="evaluate: PPO against SFT",
    **EVALUATED,
)
def evaluate(run: Run, refs: Refs) -> Any:
    """Answers of SFT and PPO to held-out prompts, compared in pairs."""
    return make(run, "evaluate", refs)


@task(
    name="compare",
    task_run_name="compare: candidate against champion",
    **EVALUATED,
)
def compare(run: Run, refs: Refs, champion: StageRef) -> Any:
    """Answers of the candidate and of the present champion, compared in pairs."""
    stage = dag.comparison(run.config, refs, champion)
    return _beside(stage, lambda: by_worker(run, "compare", stage))


@task(name="verdicts", task_run_name="ask the API's judge: PPO against SFT", **STAGE)
def verdicts(run: Run, refs: Refs) -> Any:
    """What a judge behind an API says of PPO's answers and SFT's."""
    return make(run, "verdicts", refs, _asked(run, "sft"))


@task(name="verdicts-compare", task_run_name="ask the API's judge: candidate against champion", **STAGE)
def verdicts_on_champion(run: Run, compared: StageRef) -> Any:
    """What a judge behind an API says of the candidate's answers and the champion's."""
    stage, work = dag.verdicts_on(run.config, compared), _asked(run, "champion")
    return _beside(stage, lambda: made_here(run, "verdicts-compare", stage, work, resumable=True))


def _beside(stage: Stage, made: Callable[[], StageRef]) -> Any:
    """What the task of a stage returns that is in no run's graph: it hangs on who is champion when it starts."""
    watcher().started(stage.name)
    ref = made()
    watcher().finished(stage.name, ref)
    return Completed(name="Cached", data=ref) if ref.cached else ref


def _asked(run: Run, rival: str) -> Work:
    config = run.config.evaluate.api_judge
    assert config is not None, "only a run with such a judge has this step"

    def work(stage: Stage, directory: Path) -> Mapping[str, Any]:
        (answers,) = stage.inputs.values()
        rows = gates.answers(answers.directory)
        found = api_judge.judge(config, rows, "ppo", rival, directory / api_judge.VERDICTS)
        if config.ema and rival == "sft" and "ema" in rows[0]:
            average = api_judge.judge(config, rows, "ema", "ppo", directory / api_judge.OF_EMA)
            found |= {f"ema_{name}": value for name, value in average.items()}
        return found

    return work


def standing(run: Run, version: Version) -> StageRef:
    """A registered policy as the input of a stage: as it lies on this machine, else fetched from the store once.

    Raises ConfigError where it cannot be had.
    """
    try:
        return registered.as_stage(run.store, version, dag.workspace(run.config))
    except ValueError as error:
        raise ConfigError(
            f"the champion, {version.name} version {version.version}, cannot be compared: {error}; "
            "promote the candidate by hand with `rlhf promote`"
        ) from None
