"""`rlhf doctor` and `rlhf ui`: whether this machine can run, and the servers to look at runs and models with."""

import time
from pathlib import Path
from typing import Annotated

import typer

from flows.cli import console
from flows.cli.errors import Debug
from flows.cli.models import WORKSPACE, Workspace

MARKS = {"ok": "[green]OK[/]", "note": "[cyan]note[/]", "bad": "[bold red]to do[/]"}


def doctor(
    workspace: Workspace = WORKSPACE,
    hub: Annotated[Path | None, typer.Option("--hub", help="A mirror folder to check instead of the hub.")] = None,
    debug: Debug = False,
) -> None:
    """Check this machine: Python, torch, GPUs, DeepSpeed, Prefect, MLflow, the hub, disk; OK or what to do."""
    from tasks import doctor as checking

    failed = 0
    for name, check in checking.checks(workspace, hub):
        with console.console.status(f"{name} ..."):
            finding = check()
        failed += finding.state == "bad"
        console.console.print(f"{MARKS[finding.state]:<5} [bold]{name}[/]: {finding.text}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def ui(
    workspace: Workspace = WORKSPACE,
    prefect_port: Annotated[
        int | None, typer.Option(help="Port of the Prefect server; any free one if not given.")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(help="Port of the MLflow server; any free one if not given.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Start the Prefect and MLflow servers on the stores that `rlhf run` uses, until Ctrl-C."""
    from flows import local

    with local.terminated_in_order(), local.ui_servers(workspace, prefect_port, mlflow_port) as addresses:
        for name, address in addresses.items():
            console.console.print(f"{name}: {address}", soft_wrap=True)
        console.console.print("[dim]Ctrl-C ends both.[/]")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            console.console.print("Stopped.")
