"""Stages that the worker makes: started on the run's infrastructure, watched, their end put into one sentence.

The processes are those of `infra.launch`, so call this from the flow's main thread: a Ctrl-C or a cancel is raised
there, the worker gets its time for a checkpoint, and nothing is left when the exception goes on.
"""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra import launch
from infra.gpu import GpuInfrastructure
from tasks import stages, tracking
from tasks.answers import Answers
from tasks.config import ConfigError
from tasks.profiling import TABLE, TRACE
from tasks.stages import RECORDS, REPO, Stage, StageRef, checkpoint_step, write_json

LOG = "worker.log"
Progress = Callable[[int, int, Mapping[str, float]], None]


class StageFailed(RuntimeError):  # noqa: N818 (what happened, as Prefect names its states)
    """A stage that failed for another reason than the user's input: one sentence, and where to read more."""

    def __init__(self, message: str, log: Path, again: bool = False) -> None:
        super().__init__(message)
        self.log = log
        self.again = again
        """Whether trying again may help: the worker was killed, or failed after it had come further than before."""


def make(
    stage: Stage,
    infrastructure: GpuInfrastructure,
    store: tracking.Store,
    parent_run: str,
    *,
    name: str,
    force: bool = False,
    resumable: bool = False,
    made_by: Mapping[str, str] | None = None,
    datasets: Sequence[tuple[str, Path, str]] = (),
    on_progress: Progress = lambda step, total, metrics: None,
    on_wait: Callable[[str], None] = print,
    on_answers: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StageRef:
    """The stage, as it lies there or made by the worker, with an MLflow run of its own nested in `parent_run`.

    Args:
        name: of the stage in the run's graph.
        datasets: what it reads, as `tracking.finish_stage` takes it.
        on_answers: is told PPO's answers along its way, whenever a pool of them has come.
        meanwhile: is called if the worker is started, just before; it returns at once.

    Raises ConfigError for what the user can mend and StageFailed for the rest.
    """
    run_id: str | None = None

    def work(directory: Path) -> Mapping[str, Any]:
        nonlocal run_id
        run_id = tracking.stage_run(store, parent_run, name, directory)
        answers = Answers(directory, stage.inputs["sft"].directory / "model") if stage.name == "ppo" else None

        def told(step: int, total: int, metrics: Mapping[str, float]) -> None:
            on_progress(step, total, metrics)
            if answers is not None and (rows := answers.fresh()):
                with suppress(Exception):  # a store that is down ends no training; samples.jsonl has them
                    tracking.log_table(store, str(run_id), rows, "answers.json")
                on_answers(rows)

        tracker = tracking.Tracker(store.uri, run_id)
        meanwhile()
        try:
            return run_worker(stage, directory, infrastructure, told, tracker.log, on_wait)
        finally:
            tracker.close()

    try:
        ref = stages.run(stage, work, force=force, resumable=resumable, made_by=made_by, on_wait=on_wait)
    except BaseException as error:
        if run_id is not None:
            with suppress(Exception):  # the cause is to be seen, not that the store is down as well
                tracking.end_run(store, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    if run_id is not None:
        tracking.finish_stage(store, run_id, ref, datasets)
        for trace in (TRACE, TABLE):
            if (path := ref.directory / RECORDS / trace).exists():
                tracking.log_file(store, run_id, path, "profile")
    else:
        tracking.link_cached(store, parent_run, ref, name)
    return ref


def run_worker(
    stage: Stage,
    directory: Path,
    infrastructure: GpuInfrastructure,
    on_progress: Progress,
    on_metrics: Callable[[int, Mapping[str, float]], None],
    on_wait: Callable[[str], None] = print,
) -> Mapping[str, Any]:
    """Run the worker on a stage directory and return the stage's metrics."""
    records = directory / RECORDS
    for stale in ("outcome.json", "report.json"):
        (records / stale).unlink(missing_ok=True)
    settings = {
        "stage": stage.name,
        "config": dict(stage.config),
        "inputs": {role: ref.path for role, ref in stage.inputs.items()},
        "device": infrastructure.device,
    }
    write_json(records / "config.json", settings)
    before = checkpoint_step(directory)
    outcome = launch.run(
        "tasks.worker",
        [stage.name, str(directory)],
        log=records / LOG,
        launch=infrastructure.launch(),
        cwd=REPO,
        on_progress=lambda told: on_progress(told["step"], told["total"], told["metrics"]),
        on_metrics=lambda told: on_metrics(told["step"], told["metrics"]),
        on_wait=on_wait,
    )
    report = _read(records / "report.json")
    if outcome.exit_code == 0 and report is not None:
        return report
    further = checkpoint_step(directory) != before
    raise failure(stage.name, outcome, _read(records / "outcome.json"), records / LOG, further)


def failure(stage: str, outcome: launch.Outcome, told: Mapping[str, Any] | None, log: Path, further: bool) -> Exception:
    """The exception for a worker that did not end well.

    Args:
        told: what the worker itself left as its outcome; None if it had no time to, as when it was killed.
        further: whether it wrote a checkpoint before it ended.
    """
    kind = told["kind"] if told else "killed"
    if told and kind == "user":
        return ConfigError(told["message"])
    if outcome.stalled:
        return StageFailed(
            f"{stage} said nothing for too long and was stopped; what its processes were doing stands in its log",
            log,
            True,
        )
    if told and kind == "stopped":
        return StageFailed(f"{stage} was {told['message']}; `rlhf run` goes on from there", log)
    if told:
        return StageFailed(told["message"], log, again=kind == "bug" and further)
    return StageFailed(f"{stage} {_how_it_died(outcome)}", log, again=True)


def _how_it_died(outcome: launch.Outcome) -> str:
    last = next((line.strip() for line in reversed(outcome.tail) if line.strip()), "it printed nothing")
    number = outcome.exit_code - 128
    if number == signal.SIGKILL:
        return "was killed (SIGKILL), most likely because the machine ran out of memory; lower its micro-batches"
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}; the end of its log: {last}"
    return f"ended with exit code {outcome.exit_code} and no reason; the end of its log: {last}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
