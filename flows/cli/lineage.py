"""`rlhf lineage`: where a model came from, and which models a set went into."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import console
from flows.cli.errors import Debug
from flows.cli.models import WORKSPACE, Workspace, needed_store

if TYPE_CHECKING:
    from rich.tree import Tree

    from tasks.tracking import Store


def lineage(
    model: Annotated[
        str | None,
        typer.Argument(help="A version: models:/chat-policy@champion, models:/chat-policy/3.", show_default=False),
    ] = None,
    impact: Annotated[
        str | None,
        typer.Option("--impact", metavar="SET[@REVISION]", help="Show the models that a preference set went into."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the graph to a .svg or .html file, or the record to .json.")
    ] = None,
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Show what a model was made from: base model, stages, code, data with revisions; or what a set went into."""
    if (model is None) == (impact is None):
        raise ValueError("give a model version, such as models:/chat-policy@champion, or --impact SET@REVISION")
    if impact is not None and out is not None:
        raise ValueError("--out writes what a model version was made from; leave it out with --impact")
    if out is not None and out.suffix not in (".svg", ".html", ".json"):
        raise ValueError(f"--out {out}: name a file that ends in .svg, .html or .json")
    store = needed_store(workspace)
    if impact is not None:
        _show_impact(store, impact)
    elif model is not None:
        _show_lineage(store, model, out)


def _show_lineage(store: "Store", model: str, out: Path | None) -> None:
    from rich.tree import Tree

    from tasks import lineage, tracking

    version = tracking.named_version(store, model)
    record = lineage.of_version(store, version)
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    tree = Tree(f"[bold]{version.name} version {version.version}[/]{aliases}")
    _grow(tree, record, record["root"], "", set())
    # Rich cuts a tree at 80 columns where there is no terminal.
    console.console.print(tree, width=None if console.console.is_terminal else 250)
    console.console.print()
    lines = [
        (source.name, source.revision, f"{source.rows:,}", "" if source.kept is None else f"{source.kept:,}")
        for source in lineage.sources(record)
    ]
    console.console.print(
        console.table(("data", "revision", "rows", "pairs kept"), lines, right=("rows", "pairs kept"))
    )
    for name, revision in lineage.bases(record):
        console.console.print(f"\nbase model: {name}{f'@{revision}' if revision else ''}", soft_wrap=True)
    console.console.print(f"code: {', '.join(lineage.commits(record)) or 'not in git'}", soft_wrap=True)
    if out is not None:
        _write(out, record, version)
        console.console.print(f"Written: {out}", soft_wrap=True)


def _grow(tree: "Tree", record: dict[str, Any], name: str, role: str, seen: set[str]) -> None:
    """Add a step and all that it was made from, each once."""
    from rich.markup import escape

    from tasks import lineage

    step = record["steps"][name]
    title = f"{role}[bold]{step['stage']}[/] [dim]{step['fingerprint']}[/]"
    if name in seen:
        tree.add(f"{title} [dim]see above[/]")
        return
    seen.add(name)
    branch = tree.add(f"{title} {escape(' · '.join(lineage.facts(step)))}")
    for child_role, child in lineage.children(record, name):
        _grow(branch, record, child, child_role, seen)


def _show_impact(store: "Store", asked: str) -> None:
    from tasks import lineage

    source, _, revision = asked.partition("@")
    found = lineage.impact(store, source, revision or None)
    lines = [
        (version.name, str(version.version), ", ".join(version.aliases), f"{made_from.name}@{made_from.revision}")
        for version, made_from in found
    ]
    console.console.print(console.table(("model", "version", "aliases", "made from"), lines))


def _write(out: Path, record: dict[str, Any], version: Any) -> None:
    from tasks import lineage_graph, stages

    if out.suffix == ".json":
        stages.write_json(out, record)
    elif out.suffix == ".svg":
        out.write_bytes(lineage_graph.draw(record))
    else:
        out.write_text(lineage_graph.page(record, version))
