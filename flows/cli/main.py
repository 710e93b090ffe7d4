"""The `rlhf` command: its commands, and how each ends. What a command needs is imported when it runs."""

import os

import typer

from flows.cli import chat, data, deploy, errors, infra, lineage, models, prune, run, servers, serving

app = typer.Typer(
    name="rlhf",
    help="Retrain an aligned chat model: SFT, reward model and PPO on DeepSpeed, models in the MLflow registry.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
app.command(epilog=run.STEPS)(errors.told(run.run))
app.command(epilog=run.STEPS)(errors.told(run.plan))
app.command()(errors.told(data.data))
app.command()(errors.told(servers.doctor))
app.command()(errors.told(models.models))
app.command()(errors.told(models.compare))
app.command()(errors.told(models.promote))
app.command()(errors.told(models.rollback))
app.command()(errors.told(lineage.lineage))
app.command()(errors.told(prune.prune))
app.command()(errors.told(chat.chat))
app.command()(errors.told(chat.generate))
app.command()(errors.told(serving.serve_model))
app.command()(errors.told(servers.ui))
app.command()(errors.told(deploy.deploy))
app.command()(errors.told(deploy.serve))

infrastructure = typer.Typer(help="The infrastructure blocks that a run can name.", no_args_is_help=True)
infrastructure.command("list")(errors.told(infra.list_))
infrastructure.command("register")(errors.told(infra.register))
app.add_typer(infrastructure, name="infra")


def main() -> None:
    """The console script: runs a command and exits with its code."""
    try:
        app(prog_name="rlhf")
    except SystemExit as end:
        if end.code in (errors.INTERRUPTED, errors.TERMINATED):
            # A thread that still cleans rows would keep a plain exit waiting; no process of ours is left by now.
            errors.flush()
            os._exit(end.code)
        raise
