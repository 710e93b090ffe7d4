"""What every step of a run has in common: its run, the way from a node of the graph to a finished stage, its artifacts.

The tasks of `tasks.prepare` and `tasks.train` are thin covers over `make`: Prefect shows them, the stage directories
decide what is computed. So the tasks cache and persist nothing themselves.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Completed

from infra.gpu import GpuInfrastructure, resolve
from tasks import assets, dag, events, launched, lineage, stages, tracking, unfinished
from tasks.config import ConfigError, RunConfig
from tasks.dag import Choice, Node
from tasks.fit import check_positions
from tasks.headlines import headline
from tasks.stages import Stage, StageRef
from tasks.watch import watcher

Work = Callable[[Stage, Path], Mapping[str, Any]]
SECONDS_BETWEEN_UPDATES = 5.0
"""Of a progress artifact: each is a request to the server."""


class TaskOptions(TypedDict):
    """What every task of a stage is declared with."""

    cache_policy: CachePolicy
    persist_result: bool


STAGE: TaskOptions = {"cache_policy": NO_CACHE, "persist_result": False}


def tried_again(is_worth: Callable[[Any], bool], delays: Sequence[float]) -> Callable[[Any, Any, Any], bool]:
    """A task's `retry_condition_fn`: by the exception that ended it. Who watches the run is told of each new try.

    Prefect asks only while tries are left, so a yes is always followed by one.

    Args:
        delays: seconds before each new try, as many as there may be.
    """

    def condition(task: Any, task_run: Any, state: Any) -> bool:
        if not is_worth(state.data):
            return False
        watcher().said(f"{state.data}; tried again in {delays[task_run.run_count - 1]:g} s")
        return True

    return condition


@dataclass(frozen=True)
class Run:
    """A run in progress: what its steps need to know."""

    config: RunConfig
    choice: Choice
    store: tracking.Store
    run_id: str
    """The MLflow run of the flow run."""
    infrastructure: GpuInfrastructure
    origin: Mapping[str, str]
    """Names the run to those who find a stage of it later: `flow_run_id` of Prefect, `mlflow_run`."""

    @cached_property
    def graph(self) -> dag.Graph:
        return dag.graph(self.config)


def open_run(config: RunConfig, choice: Choice, run_id: str) -> Run:
    """The run that an MLflow run belongs to."""
    store = tracking.open_store(dag.workspace(config))
    origin = {"flow_run_id": events.root_run(), "mlflow_run": run_id}
    return Run(config, choice, store, run_id, infrastructure(config), origin)


def infrastructure(config: RunConfig) -> GpuInfrastructure:
    """The infrastructure of a run. Raises ConfigError if it is unknown or this machine has not its GPUs."""
    try:
        found = resolve(config.infrastructure)
        found.launch()
    except ValueError as error:
        raise ConfigError(f"infrastructure: {error}") from None
    return found


def make(
    run: Run,
    key: str,
    refs: Mapping[str, StageRef],
    work: Work | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> State[StageRef] | StageRef:
    """What the task of a node returns: its finished stage, in a state named Cached if nothing was computed.

    Args:
        refs: the finished stages of the run so far, by key.
        work: (stage, directory) -> metrics, for a stage that is made in this process.
        meanwhile: starts what this process can do while a worker makes the stage.
    """
    node = run.graph[key]
    watcher().started(key)
    stage = dag.stage(run.config, node, refs)
    if events.sender() != events.NOWHERE:  # a deployment's run is started again by Prefect if it crashes
        unfinished.note(stage.workspace, run.origin["flow_run_id"], stage.directory)
    ref = _finished_or_made(run, node, stage, work, meanwhile)
    if node.stage == "base":
        check_positions(run.config, ref.metrics.get("positions"), f"models.{'policy' if key == 'base' else 'reward'}")
    watcher().finished(key, ref)
    assets.materialised(ref, [refs[name] for name in node.inputs.values()], node.config)
    page, figure = stage_page(run, key, ref, refs), headline(ref.stage, ref.metrics)
    create_markdown_artifact(page, key=artifact_key(key), description=figure)
    return Completed(name="Cached", data=ref) if ref.cached else ref


def _finished_or_made(run: Run, node: Node, stage: Stage, work: Work | None, meanwhile: Callable[[], None]) -> StageRef:
    if run.choice.must_be_finished(node.stage):
        if (done := stages.finished(stage)) is None:
            raise ConfigError(
                f"--from {run.choice.from_step}: {node.key} before it is not finished; run without --from"
            )
        tracking.link_cached(run.store, run.run_id, done, node.key)
        return done
    # A retry goes on where the first try came to, it does not start afresh once more.
    force = run.choice.forces(node.stage) and (task_run.run_count or 1) <= 1
    if node.launched:
        return by_worker(run, node.key, stage, force=force, resumable=node.resumable, meanwhile=meanwhile)
    assert work is not None, f"{node.key} is made in this process, so its task has to say how"
    return made_here(run, node.key, stage, work, force=force, resumable=node.resumable)


def by_worker(
    run: Run,
    key: str,
    stage: Stage,
    *,
    force: bool = False,
    resumable: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> StageRef:
    """The stage, finished already or made by the worker on the run's infrastructure."""
    return launched.make(
        stage,
        run.infrastructure,
        run.store,
        run.run_id,
        name=key,
        force=force,
        resumable=resumable,
        made_by=run.origin,
        datasets=datasets(stage),
        on_progress=Progress(key),
        on_wait=watcher().said,
        on_answers=answer_table,
        meanwhile=meanwhile,
    )


def made_here(
    run: Run, key: str, stage: Stage, work: Work, *, force: bool = False, resumable: bool = False
) -> StageRef:
    """The stage, finished already or made in this process."""
    ref = stages.run(
        stage,
        lambda directory: work(stage, directory),
        force=force,
        resumable=resumable,
        made_by=run.origin,
        on_wait=watcher().said,
    )
    tracking.link_cached(run.store, run.run_id, ref, key)
    return ref


def datasets(stage: Stage) -> list[tuple[str, Path, str]]:
    """The tables that a stage trains on and is evaluated on, as MLflow's dataset inputs."""
    if "data" not in stage.inputs:
        return []
    is_evaluation = stage.name in ("evaluate", "compare")
    phase = "ppo" if is_evaluation else stage.config.get("phase", stage.name)
    folder = stage.inputs["data"].directory
    both = [(f"{phase}-train", "training"), (f"{phase}-eval", "evaluation")]
    return [(file, folder / f"{file}.arrow", context) for file, context in (both[1:] if is_evaluation else both)]


def sources(config: RunConfig, refs: Mapping[str, StageRef]) -> list[tracking.Source]:
    """The sets that the data was made from, with the rows that each gave the phases."""
    from data_prep import stats

    rows = stats.phase_table(refs["tokenise"].directory).to_dict("index")
    found = []
    for name, settings in config.data.sources.items():
        downloaded = refs[f"download:{name}"]
        is_local = settings.path is not None or config.data.demo is not None or config.data.hub is not None
        counts = {f"rows.{file}": rows[name][file] if name in rows else 0 for file in rows["total"]}
        path = str(downloaded.directory) if is_local else None
        found.append(
            tracking.Source(name, path, str(downloaded.metrics.get("revision", "")), downloaded.digest, counts)
        )
    return found


class Progress:
    """A launched stage's progress, told to the watcher and kept as a Prefect artifact if the stage is a long one."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.artifact: UUID | None = None
        self.told = time.monotonic()

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        watcher().progressed(self.key, step, total, metrics)
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_UPDATES and not (self.artifact and step == total):
            return
        self.told = now
        percent = 100 * step / total
        shown = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        description = f"{self.key}: step {step} of {total}" + (f", {shown}" if shown else "")
        if self.artifact is None:
            created = create_progress_artifact(
                percent, key=f"{artifact_key(self.key)}-progress", description=description
            )
            assert isinstance(created, UUID)
            self.artifact = created
        else:
            update_progress_artifact(self.artifact, progress=percent, description=description)


def answer_table(rows: list[dict[str, Any]]) -> None:
    """PPO's newest answers as a Prefect artifact; each pool that is kept makes a version of it."""
    newest = rows[-1]["pool"]
    table = [row for row in rows if row["pool"] == newest]
    create_table_artifact(table, key="ppo-answers", description=f"Answers of PPO, pool {newest}")


def stage_page(run: Run, key: str, ref: StageRef, refs: Mapping[str, StageRef]) -> str:
    """What a stage's artifact says in Prefect: where it lies, which runs made it and its inputs, what came out."""
    inputs = run.graph[key].inputs
    manifest = stages.read_manifest(ref.directory) or {}
    lines = [f"## {key}{' (cached)' if ref.cached else ''}", "", headline(ref.stage, ref.metrics), ""]
    lines += [f"`{ref.path}`", "", f"Made in {ref.seconds:.1f} s by {_links(run.store, manifest)}"]
    lines += [f"digest `{ref.digest[:16]}`, code `{lineage.commit(manifest) or 'not in git'}`.", ""]
    if ref.stage == "download":
        lines += [f"Data: {run.graph[key].source} at revision `{ref.metrics['revision']}`.", ""]
    if inputs:
        lines += ["| Input | Stage | Digest | Made by |", "|---|---|---|---|"]
        for role, read in ((role, refs[name]) for role, name in inputs.items()):
            made_by = _links(run.store, stages.read_manifest(read.directory) or {})
            lines.append(f"| {role} | {read.stage} {read.fingerprint} | `{read.digest[:16]}` | {made_by} |")
        lines.append("")
    lines += ["| Metric | Value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _flat(ref.metrics)]
    return "\n".join(lines) + "\n"


def pages(store: tracking.Store, made_by: Mapping[str, str]) -> dict[str, str]:
    """Title -> address of the pages about the run that made a stage; Prefect's own as the path on its server."""
    found = {}
    if flow_run_id := made_by.get("flow_run_id"):
        found["Prefect run"] = f"/v2/runs/flow-run/{flow_run_id}"  # the older UI fails to list a run's tasks
    if (mlflow_run := made_by.get("mlflow_run")) and (address := tracking.run_url(store, mlflow_run)):
        found["MLflow run"] = address
    return found


def _links(store: tracking.Store, manifest: Mapping[str, Any]) -> str:
    found = pages(store, manifest.get("made_by", {}))
    return ", ".join(f"[{title}]({address})" for title, address in found.items()) or "a run that is not known"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)


def artifact_key(text: str) -> str:
    """A key that Prefect takes: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
