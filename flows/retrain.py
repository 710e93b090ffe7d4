"""The flow: prepare -> SFT -> reward model -> PPO -> evaluate -> register -> promote.

It may end early (`until`), begin late (`from_stage`) or make one stage anew (`force`); otherwise a stage that is
finished is never made again. What the run came to is written to a report.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from prefect import flow, get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.exceptions import Pause
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.alone import alone, died
from flows.approval import consent, ended
from flows.prepare import preparation
from flows.promotion import promotion
from flows.queued import cancel_covered
from infra.witness import witnessed
from tasks import (
    api_judge,
    approval,
    dag,
    evaluation_report,
    events,
    gates,
    headlines,
    lineage,
    lineage_graph,
    page,
    plan,
    prune,
    registered,
    remote,
    report,
    steps,
    tracking,
    train,
    unfinished,
)
from tasks.approval import Waiting
from tasks.config import RunConfig
from tasks.dag import Choice
from tasks.history import Move
from tasks.promote import Judgement, Verdict, look, needs_comparison, settled, terms
from tasks.register import Registration, policy_name, register_models, registered_already
from tasks.report import StepRow
from tasks.stages import StageRef
from tasks.steps import Run, open_run

Refs = dict[str, StageRef]
MOST_RESTARTS = 5
"""Of a deployment's run that crashes and is scheduled again."""


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    name: str
    """Of the flow run."""
    rows: list[StepRow]
    registration: Registration | None
    verdict: Verdict | None
    versions: Mapping[str, str]
    """Registered model -> version and aliases."""
    report: Path
    mlflow_run: str
    mlflow_url: str | None


class Outcome:
    """What a run has come to so far; grows with its steps."""

    def __init__(self) -> None:
        self.refs: Refs = {}
        self.registration: Registration | None = None
        self.verdict: Verdict | None = None
        self.promotion_seconds = 0.0


def _run_name() -> str:
    """A run that comes back, after a crash or a decision, keeps the name that its MLflow run and report have."""
    if flow_run.run_count:  # how often it was started before
        return str(flow_run.name)
    return f"{flow_run.parameters['config'].name}-{datetime.now():%Y%m%d-%H%M%S}"


@flow(name="retrain", flow_run_name=_run_name, persist_result=False)
def retrain(
    config: RunConfig,
    from_stage: str | None = None,
    until: str | None = None,
    force: str | None = None,
    only_if_new: bool = False,
) -> "Result | State[None]":
    """Retrain a model.

    Args:
        config: what the run is told; every default is in `tasks.config`.
        from_stage: everything before this step has to be finished; it and all after it are made anew.
        until: the last step.
        force: this one stage is made anew.
        only_if_new: end at once where data, config and code are those of a registered policy that has its verdict. Does
            nothing beside from_stage, until or force, nor in a run that starts again.

    Returns a Result; None, by a completed state that says so, if there was nothing new.
    """
    with alone(dag.workspace(config), str(flow_run.id)), prune.in_use(dag.workspace(config)):
        return _retrained(config, Choice(from_stage, until, force), only_if_new)


def _retrained(config: RunConfig, choice: Choice, only_if_new: bool) -> "Result | State[None]":
    workspace, name = dag.workspace(config), str(flow_run.name)
    waiting = approval.read(workspace, str(flow_run.id))  # this run was suspended, and comes back with an answer
    if waiting is None:
        cancel_covered()
        config = registered.pinned(config)
        choice.check(dag.graph(config))
        if config.evaluate.api_judge is not None:
            api_judge.check(config.evaluate.api_judge)
        if config.remote is not None:
            remote.check(config.remote)
        steps.infrastructure(config)  # a run on GPUs that are not there ends here, before any work
        plan.check_finished(config, choice)
    store = tracking.open_store(workspace)
    # What this run itself left running is of a try that was killed.
    tracking.end_dead(store, lambda run: run == str(flow_run.id) or died(workspace, run))
    approval.settle(store, workspace, ended)
    moves = look(store, policy_name(config.name))
    may_end = only_if_new and choice == Choice() and flow_run.run_count <= 1
    left = waiting.mlflow_run if waiting else tracking.run_of(store, str(flow_run.id), config)
    if left is not None:
        run_id = left
        tracking.set_status(store, run_id, "RUNNING")
    elif may_end and (known := _nothing_new(store, config, moves)):
        return Completed(message=known)
    else:
        origin = {"prefect.flow_run": name, tracking.FLOW_RUN: str(flow_run.id)}
        run_id = tracking.start_run(store, config, origin, name)
    outcome = Outcome()
    try:
        _check_restarts()
        # The run's tag is for finding runs: every task that bears one asks the server for a slot of its limit.
        with witnessed(), TagsContext(current_tags=set()):
            run = open_run(config, choice, run_id)
            if waiting is not None:
                _decide(run, outcome, waiting)
            else:
                for _ in _steps(run, outcome):
                    if choice.is_reached(run.graph, outcome.refs):
                        break
        result = _closed(run, name, outcome)
    except Pause:
        tracking.set_status(store, run_id, "SCHEDULED")
        raise
    except BaseException as error:
        with suppress(Exception):  # the cause is to be seen, not that the store is down as well
            tracking.end_run(store, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        if isinstance(error, Exception):
            unfinished.forget(workspace, str(flow_run.id))
        raise
    tracking.end_run(store, run_id, "FINISHED")
    approval.forget(workspace, str(flow_run.id))
    unfinished.forget(workspace, str(flow_run.id))
    return result


def _check_restarts() -> None:
    """RuntimeError if the run crashed too often. Prefect does not count its return from a person's decision."""
    if flow_run.run_count - 1 > MOST_RESTARTS:
        raise RuntimeError(
            f"The run started again {MOST_RESTARTS} times without coming to its end; mend that, start another."
        )


def _nothing_new(store: tracking.Store, config: RunConfig, moves: Sequence[Move]) -> str | None:
    """Why a run would change nothing, as a sentence; None where a stage is to be made or a candidate to be judged."""
    done = plan.finished(config)
    if done is None or not registered_already(store, config, done):
        return None
    known = tracking.versions(store, policy_name(config.name))
    version = next(entry for entry in known if entry.digest == done["ppo"].digest)
    waits = approval.where_to_decide(version.tags)
    what = f"waits for approval: {waits}" if waits else settled(version, moves, terms(config, done))
    same = f"data, config and code are those of {version.name} version {version.version}"
    return what and f"Nothing new: {same}, which {what}."


def _steps(run: Run, outcome: Outcome) -> Iterator[None]:
    """The steps in order; the run may end at each yield."""
    refs = outcome.refs
    refs |= preparation(run.config)(run.config, run.choice, run.run_id)
    yield
    refs["sft"] = train.sft(run, refs, return_state=True).result()
    yield
    refs["reward"] = train.reward(run, refs, return_state=True).result()
    yield
    if "gold" in run.graph:
        refs["gold"] = train.gold(run, refs, return_state=True).result()
        yield
    refs["ppo"] = train.ppo(run, refs, return_state=True).result()
    yield
    refs["evaluate"] = train.evaluate(run, refs, return_state=True).result()
    yield
    if "verdicts" in run.graph:
        refs["verdicts"] = train.verdicts(run, refs, return_state=True).result()
        yield
    outcome.registration = register_models(run.store, run.config, refs, run.run_id, return_state=True).result()
    if run.choice.until == "register":
        return
    judgement = _judged(run, outcome.registration, refs)
    _decide(run, outcome, Waiting(refs, outcome.registration, judgement, run.run_id))


def _decide(run: Run, outcome: Outcome, waiting: Waiting) -> None:
    """Promote the candidate or not, where the config says so only after a person was asked: see `flows.approval`."""
    made, judgement = waiting.registration, waiting.judgement
    outcome.refs, outcome.registration = dict(waiting.refs), made
    said = consent(run, waiting)
    began = time.monotonic()
    outcome.verdict = promotion(
        made.policy, made.policy_version, str(dag.workspace(run.config)), judgement, consent=said
    )
    outcome.promotion_seconds = time.monotonic() - began


def _judged(run: Run, registration: Registration, refs: Refs) -> Judgement:
    """How the candidate does: against the champion if there is another one, else against the SFT model."""
    candidate = tracking.find_version(run.store, registration.policy, registration.policy_version)
    champion = tracking.alias(run.store, registration.policy, tracking.CHAMPION)
    compared = None
    if champion is not None and needs_comparison(candidate, champion):
        refs["compare"] = train.compare(run, refs, train.standing(run, champion), return_state=True).result()
        compared = gates.answers(refs["compare"].directory)
        if run.config.evaluate.api_judge is not None:
            found = train.verdicts_on_champion(run, refs["compare"], return_state=True).result()
            refs["verdicts-compare"] = found
    evaluated = refs["evaluate"].directory
    evidence = gates.Evidence(
        gates.answers(evaluated),
        compared,
        reward=refs["reward"].metrics,
        gold=refs["gold"].metrics if "gold" in refs else None,
        verdicts=gates.verdicts(refs.get("verdicts" if compared is None else "verdicts-compare")),
        texts=gates.texts(evaluated),
        prefer_gold=run.config.promote.judge == "gold",
    )
    sentences = run.config.promote.gates.sentences
    results = gates.check(sentences, evidence)
    missed = [result for result in gates.check_champion(sentences, evidence) if not result.passed]
    if champion is not None and missed:
        events.champion_below_gate(champion.name, champion.version, missed)
    return Judgement(results, champion.version if champion else None, terms(run.config, refs))


def _closed(run: Run, name: str, outcome: Outcome) -> Result:
    """Report, artifacts and result of a run that came to its end."""
    rows = [*headlines.rows(outcome.refs.values()), *_last_rows(outcome)]
    versions = _versions(run.store, outcome.registration)
    url = tracking.run_url(run.store, run.run_id)
    verdict = outcome.verdict
    summary = report.RunSummary(
        name=run.config.name,
        flow_run=name,
        verdict=verdict.reason if verdict else f"The run ended after {run.choice.until}, as asked for.",
        promoted=verdict is not None and verdict.promoted,
        gates=verdict.gates if verdict else [],
        rows=rows,
        refs=outcome.refs,
        config=yaml.safe_dump(tracking.redacted(run.config.model_dump(mode="json")), sort_keys=False),
        versions=versions,
        run_id=run.run_id,
        run_url=url,
        samples=run.config.evaluate.samples,
        memory={fit.stage: fit.compared for fit in plan.measured(run.config, outcome.refs)},
    )
    path = report.write(dag.workspace(run.config) / "reports" / f"{name}.html", summary)
    tracking.log_file(run.store, run.run_id, path)
    get_run_logger().info("%s Report: %s", summary.verdict, path)
    _artifacts(run, outcome, rows, summary, path)
    return Result(name, rows, outcome.registration, verdict, versions, path, run.run_id, url)


def _last_rows(outcome: Outcome) -> list[StepRow]:
    """The lines of the steps that leave no stage directory."""
    lines = []
    if made := outcome.registration:
        metric = ", ".join(f"{name} {number}" for name, number in made.versions.items())
        lines.append(StepRow("register", made.seconds, made.cached, metric))
    if outcome.verdict:
        metric = "promoted" if outcome.verdict.promoted else "champion unchanged"
        lines.append(StepRow("promote", outcome.promotion_seconds, False, metric))
    return lines


def _versions(store: tracking.Store, registration: Registration | None) -> dict[str, str]:
    if registration is None:
        return {}
    numbers = registration.versions
    aliases = {name: tracking.find_version(store, name, number).aliases for name, number in numbers.items()}
    return {name: f"{number} ({', '.join(aliases[name]) or 'no alias'})" for name, number in numbers.items()}


def _artifacts(run: Run, outcome: Outcome, rows: list[StepRow], summary: report.RunSummary, path: Path) -> None:
    """What Prefect shows of the whole run: the steps, the comparison, the curves, the way to MLflow."""
    create_table_artifact([_table_line(row) for row in rows], key="steps", description=summary.verdict)
    if "evaluate" in outcome.refs:
        table = evaluation_report.comparison(outcome.refs)
        create_table_artifact(table, key="metrics", description="PPO against SFT")
        said = (
            evaluation_report.hacking(outcome.refs["evaluate"].metrics)
            or "One reward model judged: the run has no other"
        )
        create_table_artifact(evaluation_report.win_rates(outcome.refs), key="win-rates", description=said)
        by_source = evaluation_report.per_source(outcome.refs)
        create_table_artifact(by_source, key="win-rates-by-source", description="Win rates per source")
    trained = [outcome.refs[key] for key in report.DRAWN if key in outcome.refs]
    if summary.curves and not all(ref.cached for ref in trained):  # else an earlier run has the same picture
        create_image_artifact(page.embedded(summary.curves), key="curves", description="Reward, KL and losses")
    if "ppo" in outcome.refs:
        _lineage_artifacts(run, outcome.refs["ppo"])
    where = f"[{summary.flow_run}]({summary.run_url})" if summary.run_url else tracking.how_to_open(run.store)
    kept = f", [in MLflow]({summary.run_url}/artifacts/{path.name})" if summary.run_url else ""
    text = f"MLflow run `{run.run_id}`: {where}\n\nReport: `{path}`{kept}\n"
    create_markdown_artifact(text, key="mlflow", description="The run in MLflow")


def _lineage_artifacts(run: Run, policy: StageRef) -> None:
    """Where the policy came from, as a list with links to the runs behind it, and drawn."""
    record = lineage.gather(policy.directory)
    text = lineage.markdown(record, lambda made_by: steps.pages(run.store, made_by))
    create_markdown_artifact(text, key="lineage", description="What the policy was made from")
    create_image_artifact(
        page.embedded(lineage_graph.draw(record, "png")), key="lineage-graph", description="The same, drawn"
    )


def _table_line(row: StepRow) -> dict[str, str]:
    time = "cached" if row.cached else page.duration(row.seconds)
    return {"step": row.step, "time": time, "main metric": row.metric}
