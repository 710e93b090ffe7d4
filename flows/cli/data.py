"""`rlhf data`: what a run is trained on, as counts, as lengths, and row by row."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli import console, run
from flows.cli.errors import Debug
from flows.cli.run import Config, Overrides

if TYPE_CHECKING:
    from rich.text import Text

    from data_prep.show import Shown
    from tasks.config import RunConfig
    from tasks.stages import StageRef

Show = Annotated[
    int | None,
    typer.Option(
        "--show",
        metavar="N",
        min=1,
        help="Show N rows as they are trained on, instead of counts; 5 where an option below says which.",
    ),
]
Source = Annotated[
    str | None, typer.Option("--source", help="Only rows of this source: its name, or the last part, such as SHP.")
]
Phase = Annotated[
    Literal["sft", "reward", "ppo", "judge"] | None, typer.Option(help="Whose rows are shown; sft if not given.")
]
Side = Annotated[
    Literal["train", "eval"] | None,
    typer.Option(help="Rows that are trained on, or held out; train if not given."),
]


def data(
    config: Config,
    set_: Overrides = None,
    show: Show = None,
    source: Source = None,
    phase: Phase = None,
    side: Side = None,
    debug: Debug = False,
) -> None:
    """Show what a run is trained on: rows kept and dropped, and token lengths. Prepares the data if need be."""
    from tasks import dag, plan, prune, registered
    from tasks.config import load

    asked = load(config, set_ or ())
    with prune.in_use(dag.workspace(asked)):
        parsed = registered.pinned(asked)
        refs = plan.finished(parsed, "tokenise")
        if refs is None:
            run.execute(*run.checked(config, set_, None, "tokenise", None), debug)
            refs = plan.finished(parsed, "tokenise")
            assert refs is not None, "the flow has just made them"
        if show or source or phase or side:
            _show(
                refs, f"{phase or 'sft'}-{side or 'train'}", source, show or 5, parsed.models.policy_trust_remote_code
            )
        else:
            _counts(parsed, refs)


def _counts(config: "RunConfig", refs: "Mapping[str, StageRef]") -> None:
    from data_prep import stats
    from tasks import data_report

    folder = refs["tokenise"].directory
    numbers = ("rows in", "kept")
    lines = [
        (line["name"], f"{line['rows_in']:,}", f"{line['kept']:,}", _reasons(line["counts"]))
        for line in data_report.data_table(refs)
    ]
    _section("Cleaned and blended")
    console.console.print(console.table(("source", *numbers, "dropped"), lines, right=numbers))
    metrics = refs["tokenise"].metrics
    phases = [name for name in data_report.PHASES if name in metrics]
    tokenised = [
        (f"{name} {side}", f"{counts['rows_in']:,}", f"{counts['kept']:,}", _reasons(counts["drops"]))
        for name in phases
        for side, counts in metrics[name].items()
    ]
    _section("Tokenised")
    console.console.print(console.table(("phase", *numbers, "dropped"), tokenised, right=numbers))
    rows = stats.phase_table(folder)
    _section("Rows per phase, train + held out")
    cells = (
        (_short(name), *(f"{row[f'{phase}-train']:,} + {row[f'{phase}-eval']:,}" for phase in phases))
        for name, row in rows.iterrows()
    )
    console.console.print(console.table(("source", *phases), cells, right=phases))
    lengths = stats.token_table(stats.token_lengths(folder))
    _section("Tokens per train row")
    shown = (
        (*map(_short, key), *(f"{value:,.0f}" for value in line))
        for key, line in zip(lengths.index, lengths.values, strict=True)
    )
    columns = ("phase", "part", "source", *lengths.columns)
    console.console.print(console.table(columns, shown, right=tuple(lengths.columns)))
    console.console.print(
        f"\n[dim]Report:[/] {data_report.make(config, refs).directory / data_report.PAGE}", soft_wrap=True
    )


def _short(name: object) -> str:
    """The last part of a source's name, where tables are wide."""
    return str(name).rpartition("/")[2]


def _section(title: str) -> None:
    console.console.print(f"\n[bold]{title}[/]")


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in Counter(counts).most_common())


def _show(refs: "Mapping[str, StageRef]", table: str, source: str | None, count: int, trusted: bool) -> None:
    from data_prep import show
    from data_prep.tokenizer import load_tokenizer

    path = refs["tokenise"].directory / f"{table}.arrow"
    if not path.is_file():
        raise ValueError(f"this run has no {table} rows; give data.phases a share for it")
    tokenizer = load_tokenizer(refs["base"].directory / "tokenizer", trusted)
    rows = show.shown(path, table.partition("-")[0], tokenizer, source, count)
    colours = console.console.is_terminal
    key = "[cyan]prompt[/], [green]answer, which the loss is about[/], [reverse]special token[/]"
    console.console.print(key if colours else "Between [[ and ]]: the answer, which the loss is about.", markup=colours)
    for row in rows:
        what = row.answer or "prompt"
        console.console.print(f"\n[bold]{row.source}[/] [dim]{what}, {row.tokens} tokens[/]")
        console.console.print(_coloured(row) if colours else _marked(row), markup=False, soft_wrap=not colours)


def _coloured(row: "Shown") -> "Text":
    from rich.text import Text

    text = Text()
    for part in row.segments:
        style = "green" if part.learnt else "cyan"
        text.append(console.printable(part.text), f"{style} reverse" if part.special else style)
    return text


def _marked(row: "Shown") -> str:
    """The same without colours: what is learnt stands between double brackets."""
    text, inside = "", False
    for part in row.segments:
        if part.learnt != inside:
            text += "[[" if part.learnt else "]]"
            inside = part.learnt
        text += console.printable(part.text)
    return text + ("]]" if inside else "")
