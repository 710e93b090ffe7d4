"""`rlhf models` and `rlhf promote`: what is registered, and which version serves."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli import console
from flows.cli.errors import Debug, State

if TYPE_CHECKING:
    from tasks.tracking import Store, Version

Workspace = Annotated[
    Path, typer.Option("--workspace", "-w", help="Folder of the MLflow store, unless MLFLOW_TRACKING_URI is set.")
]
WORKSPACE = Path("workspace")
MEASURES = (
    ("metric.win_rate", "win rate"),
    ("metric.ppo_reward", "reward"),
    ("metric.ppo_kl", "KL"),
    ("metric.ema_win_rate", "win rate over the last policy"),
    ("metric.ema_reward", "reward"),
    ("metric.ema_kl", "KL"),
    ("metric.accuracy", "accuracy"),
)
"""Tag of a version -> what it is called here."""


def models(workspace: Workspace = WORKSPACE, debug: Debug = False) -> None:
    """Show the registered models: versions, aliases, metrics."""
    from tasks import tracking

    store = existing_store(workspace)
    names = tracking.registered_names(store) if store else []
    if not names:
        console.console.print("No model is registered yet; `rlhf run CONFIG` registers the first.")
        return
    assert store is not None
    lines = [_line(version) for name in names for version in tracking.versions(store, name)]
    console.console.print(console.table(("model", "version", "aliases", "metrics", "registered"), lines))
    console.console.print(f"\n{tracking.how_to_open(store)}", soft_wrap=True)


def promote(
    name: Annotated[str, typer.Argument(help="A registered policy, such as chat-policy, or chat.", show_default=False)],
    version: Annotated[int, typer.Argument(help="Its version.", show_default=False)],
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Make a version the champion, whatever it was measured at. Its reward model follows."""
    from flows import local
    from tasks import promote as promoting
    from tasks import tracking

    store = existing_store(workspace)
    if store is None:
        raise ValueError(f"there is no MLflow store in {workspace}; give the workspace of the run with --workspace")
    policy = promoting.resolve(store, name)  # what is wrong with the request shows before a server starts
    tracking.find_version(store, policy, version)
    with local.terminated_in_order(), local.PrefectServer(workspace / "logs", quiet=not debug) as server:
        from flows.promotion import promotion

        State.log = workspace / "logs" / "promote.log"
        with server.connected(), local.logged_to(State.log):
            verdict = promotion(policy, version, str(workspace))
    console.console.print(verdict.reason, soft_wrap=True)


def existing_store(workspace: Path) -> "Store | None":
    """The store of a workspace, or None: looking does not make one."""
    import os

    if not os.environ.get("MLFLOW_TRACKING_URI") and not (workspace / "mlflow.db").exists():
        return None
    from tasks import tracking

    return tracking.open_store(workspace)


def _line(version: "Version") -> tuple[str, ...]:
    measured = [f"{title} {float(version.tags[tag]):.3g}" for tag, title in MEASURES if tag in version.tags]
    registered = f"{datetime.fromtimestamp(version.created):%Y-%m-%d %H:%M}"
    aliases = ", ".join(f"[green]{a}[/]" if a == "champion" else a for a in version.aliases)
    return version.name, str(version.version), aliases, ", ".join(measured), registered
