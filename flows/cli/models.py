"""`rlhf models`, `compare`, `promote` and `rollback`: what is registered, and which version serves."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli import console
from flows.cli.errors import Debug, State

if TYPE_CHECKING:
    from tasks.history import Move
    from tasks.tracking import Store, Version

Workspace = Annotated[
    Path, typer.Option("--workspace", "-w", help="Folder of the MLflow store, unless MLFLOW_TRACKING_URI is set.")
]
WORKSPACE = Path("workspace")
MEASURES = (
    ("metric.win_rate", "win rate"),
    ("metric.gold_win_rate", "by the gold reward model"),
    ("metric.ppo_reward", "reward"),
    ("metric.ppo_kl", "KL"),
    ("metric.ema_win_rate", "win rate over the last policy"),
    ("metric.ema_reward", "reward"),
    ("metric.ema_kl", "KL"),
    ("metric.accuracy", "accuracy"),
)
"""Tag of a version -> what it is called here."""


Name = Annotated[str, typer.Argument(help="A registered policy, such as chat-policy, or chat.", show_default=False)]
Why = Annotated[str, typer.Option("--why", help="The reason, kept with the move.")]
Named = Annotated[
    str, typer.Argument(help="A version: chat-policy@champion, models:/chat-policy/3.", show_default=False)
]


def models(
    history: Annotated[
        bool, typer.Option("--history", help="Show who served when, who moved the champion, and why.")
    ] = False,
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Show the registered models: versions, aliases, metrics; or the history of their champions."""
    from flows import local
    from tasks import approval, registered, tracking
    from tasks import promote as promoting

    store = existing_store(workspace)
    names = tracking.registered_names(store) if store else []
    if not names:
        console.console.print("No model is registered yet; `rlhf run CONFIG` registers the first.")
        return
    assert store is not None
    with local.heard() as answers:  # an alias that was moved by hand is noticed by who looks
        if answers:
            from flows.approval import ended

            approval.settle(store, Path(store.workspace), ended)
        moves = {name: promoting.look(store, name) for name in names if name.endswith(registered.POLICY)}
    if history:
        for name, known in moves.items():
            for move in known:
                console.console.print(_move(name, move), soft_wrap=True)
    else:
        every = [version for name in names for version in tracking.versions(store, name)]
        lines = [_line(version) for version in every]
        console.console.print(console.table(("model", "version", "aliases", "metrics", "registered"), lines))
        for version in every:
            if where := approval.where_to_decide(version.tags):
                said = f"{version.name} version {version.version} waits for a person to approve it: {where}"
                console.console.print(said, style="yellow", soft_wrap=True)
    console.console.print(f"\n{tracking.how_to_open(store)}", soft_wrap=True)


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="Its version.", show_default=False)],
    why: Why = "",
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Make a version the champion, whatever it was measured at. Its reward model follows."""
    from tasks import promote as promoting
    from tasks import tracking

    store = needed_store(workspace)
    policy = promoting.resolve(store, name)  # what is wrong with the request shows before a server starts
    tracking.find_version(store, policy, version)
    _moved("promotion", policy, version, workspace, why, debug)


def rollback(name: Name, why: Why = "", workspace: Workspace = WORKSPACE, debug: Debug = False) -> None:
    """Take the champion back: what served before it serves again, its reward model too."""
    from tasks import promote as promoting
    from tasks import tracking

    store = needed_store(workspace)
    policy = promoting.resolve(store, name)
    champion = tracking.alias(store, policy, tracking.CHAMPION)
    if champion is None:
        raise ValueError(f"{policy} has no champion to roll back; `rlhf promote {name} VERSION` makes one")
    _moved("rollback", policy, champion.version, workspace, why, debug)


def compare(first: Named, second: Named, workspace: Workspace = WORKSPACE, debug: Debug = False) -> None:
    """Show two registered versions side by side: what was measured of them, and what was different in their making."""
    from tasks import difference, lineage, tracking

    store = needed_store(workspace)
    versions = [tracking.named_version(store, name) for name in (first, second)]
    titles = [f"{version.name} {version.version}" for version in versions]
    aliases = [", ".join(version.aliases) or "none" for version in versions]
    lines = [("aliases", *aliases), *difference.measured(*versions)]
    console.console.print(console.table(("", *titles), lines))
    console.console.print("\n[bold]Made differently[/]")
    made = difference.made(*(lineage.of_version(store, version) for version in versions))
    console.console.print(console.table(("", *titles), made) if made else "In nothing that is recorded.")


def _moved(flow: str, policy: str, version: int, workspace: Path, why: str, debug: bool) -> None:
    """Run a flow that moves the champion, and say what came of it."""
    from flows import local

    with local.terminated_in_order(), local.PrefectServer(workspace / "logs", quiet=not debug) as server:
        from flows import promotion

        State.log = workspace / "logs" / f"{flow}.log"
        with server.connected(), local.logged_to(State.log):
            verdict = getattr(promotion, flow)(policy, version, str(workspace), why=why)
    console.console.print(verdict.reason, soft_wrap=True)


def needed_store(workspace: Path) -> "Store":
    """The store of a workspace. Raises ValueError if it has none."""
    store = existing_store(workspace)
    if store is None:
        raise ValueError(f"there is no MLflow store in {workspace}; give the workspace of the run with --workspace")
    return store


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


def _move(name: str, move: "Move") -> str:
    from rich.markup import escape

    at = f"{datetime.fromisoformat(move.at).astimezone():%Y-%m-%d %H:%M:%S}"
    step = f"{move.before or 'none'} → {move.after or 'none'}"
    return f"{at}  [bold]{name}[/] {step}  {move.kind}, {escape(move.by)}\n  [dim]{escape(move.why)}[/]"
