"""`rlhf run` and `rlhf plan`: a config file with overrides to a run, or to what it would do."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import console
from flows.cli.errors import Debug, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flows.retrain import Result
    from tasks.config import RunConfig
    from tasks.dag import Choice

Config = Annotated[Path, typer.Argument(help="A run config, such as infra/runs/demo.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set a value of the config, such as ppo.kl_coef=0.1. Repeatable."),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="STEP", help="Make this step and all after it anew; all before it has to be finished."
    ),
]
Until = Annotated[str | None, typer.Option("--until", metavar="STEP", help="End after this step.")]
Force = Annotated[
    str | None,
    typer.Option("--force", metavar="STAGE", help="Make this stage anew even if it is finished; others as needed."),
]
STEPS = (
    "Steps: demo, download, clean, blend, split, base, tokenise, ptx, sft, reward, gold, ppo, evaluate, verdicts, "
    "register, promote."
)


def run(
    config: Config,
    set_: Overrides = None,
    from_: From = None,
    until: Until = None,
    force: Force = None,
    debug: Debug = False,
) -> None:
    """Run the whole flow: data in, a registered model out. What is finished already is not made again."""
    parsed, choice = checked(config, set_, from_, until, force)
    console.result(execute(parsed, choice, debug))


def plan(
    config: Config,
    set_: Overrides = None,
    from_: From = None,
    until: Until = None,
    force: Force = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="GPU", help="Also say whether it fits this GPU: h100, a100-40 ..., or its GiB."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what a run would do: its stages in order, what is cached, what would run and why.

    Nothing is made; with `remote`, what is finished there is fetched.
    """
    from tasks import plan as planning
    from tasks.headlines import headline_of_many

    parsed, choice = checked(config, set_, from_, until, force, here=gpu is None)
    lines = planning.plan(parsed, choice)
    shown = [
        (
            console.title(group[0].key) if len(group) == 1 else f"{group[0].stage} × {len(group)}",
            "[cyan]cached[/]" if group[0].cached else "[yellow]would run[/]",
            group[0].why or headline_of_many(group[0].stage, [line.metrics for line in group]),
            ", ".join(dict.fromkeys(key.partition(":")[0] for key in group[0].reads)),
        )
        for group in planning.together(lines)
    ]
    console.console.print(console.table(("stage", "", "result, or why it runs", "reads"), shown))
    cached = sum(line.cached for line in lines)
    console.console.print(f"\n{cached} of {len(lines)} stages cached, {len(lines) - cached} would run.")
    if gpu is not None:
        show_fit(parsed, gpu, {line.stage: line.metrics for line in lines if line.cached})


def show_fit(config: "RunConfig", name: str, made: "Mapping[str, Mapping[str, Any]]") -> None:
    """The memory and the time of each training stage on a GPU, term by term, and the fastest setting that fits.

    `made` are the metrics of finished stages.
    """
    from tasks import plan as planning
    from tasks.fit import gpu_of
    from tasks.shapes import GIB

    gpu, gpus = gpu_of(name), planning.gpus_of(config)
    fits = planning.will_it_fit(config, gpu, gpus, made)
    rows = []
    for fit in fits:
        memory = fit.setting.memory
        terms = [f"{term} {size / GIB:.1f}" for term, size in vars(memory).items() if size > 0.05 * GIB]
        verdict = "[green]fits[/]" if fit.fits else "[red]does not fit[/]"
        rows.append(
            (
                console.title(fit.stage),
                verdict,
                f"{memory.needed / GIB:.1f}",
                f"{fit.setting.seconds:.2f}",
                ", ".join(terms),
            )
        )
    console.console.print(f"\nOn {gpus} x {name} with {gpu.memory / GIB:.0f} GiB, estimated per GPU:")
    console.console.print(console.table(("stage", "", "GiB", "s a step", "of which GiB"), rows))
    for fit in fits:
        if fit.cheapest is None:
            said = "no setting fits; lower the micro-batch, or take a larger GPU"
        else:
            said = f"the fastest that fits is {fit.cheapest.name}"
        if fit.cheapest != fit.setting:
            console.console.print(f"{console.title(fit.stage)}: {said}.")
        if fit.compared:
            console.console.print(f"{console.title(fit.stage)}: {fit.compared}, as it was made.")


def execute(config: "RunConfig", choice: "Choice", debug: bool) -> "Result":
    """Run the flow with its progress on the console."""
    from flows import local
    from tasks import dag

    workspace = dag.workspace(config)
    name = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    logs = workspace / "logs"
    with (
        local.terminated_in_order(),
        console.RunDisplay() as display,
        local.PrefectServer(logs, quiet=not debug) as server,
    ):
        State.log = logs / f"{name}.log"
        State.resume = "What is finished stays; run the same command again and it goes on."
        display.waiting("start Prefect and MLflow")
        with local.imported():
            from prefect import tags

            from flows.retrain import Result, retrain
            from tasks import tracking
            from tasks.watch import watched_by

            tracking.open_store(workspace)  # imports MLflow; made and migrated while the server boots
        with server.connected(), local.logged_to(State.log), watched_by(display), tags(config.name):
            display.ended("start Prefect and MLflow")
            flow = retrain.with_options(flow_run_name=name)
            result = flow(config, from_stage=choice.from_step, until=choice.until, force=choice.force)
    assert isinstance(result, Result), "only a run with only_if_new ends without one"
    return result


def checked(
    config: Path,
    overrides: list[str] | None,
    from_: str | None,
    until: str | None,
    force: str | None,
    here: bool = True,
) -> "tuple[RunConfig, Choice]":
    """Config and choice, with all that can be said against them before any work; of this machine only with `here`."""
    from tasks import dag, plan, registered
    from tasks.config import load

    parsed = registered.pinned(load(config, overrides or ()))
    choice = dag.Choice(from_, until, force)
    choice.check(dag.graph(parsed))
    plan.check_reward_models(parsed)
    plan.check_lengths(parsed)
    if here:
        plan.check_machine(parsed)
    plan.check_finished(parsed, choice)
    return parsed, choice
