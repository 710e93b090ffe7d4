"""`rlhf prune`: what no registered model needs goes."""

from collections import defaultdict
from typing import Annotated

import typer

from flows.cli import console
from flows.cli.errors import Debug
from flows.cli.models import WORKSPACE, Workspace, needed_store


def prune(
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            min=1,
            help="Delete versions too: all but each model's newest so many and those with an alias.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only show what would go.")] = False,
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Remove stages, checkpoints and copies that no registered version was made from. Shows first what would go."""
    from tasks import prune as pruning

    store = needed_store(workspace)
    planned = pruning.plan(store, keep)
    groups: dict[tuple[str, str], list[pruning.Removal]] = defaultdict(list)
    for removal in planned.removals:
        groups[removal.directory.parent.name, removal.why].append(removal)
    lines = [
        (stage, str(len(group)), size(sum(removal.size for removal in group)), why)
        for (stage, why), group in groups.items()
    ]
    lines += [
        (version.name, f"version {version.version}", "", "beyond --keep, no alias") for version in planned.versions
    ]
    if planned.spared:
        console.console.print(
            f"{planned.spared} stage directories stay for a deployment's run that has not come to its end."
        )
    if not lines:
        behind = "a registered version" + (" or such a run" if planned.spared else "")
        console.console.print(f"Nothing to remove: every stage in the workspace is behind {behind}.")
        return
    console.console.print(
        console.table(("stage", "directories", "frees", "why"), lines, right=("directories", "frees"))
    )
    if not yes:
        console.console.print(f"\n{size(planned.size)} in all. Nothing is removed yet: add --yes.")
        return
    removed = pruning.carry_out(store, planned)
    console.console.print(f"\n{size(sum(removal.size for removal in removed))} removed.")


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
