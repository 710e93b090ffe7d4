"""How a command ends: its exit code and, where something went wrong, one sentence.

0 done; 1 failed; 2 the user's input, with how to mend it; 130 Ctrl-C; 143 SIGTERM.
"""

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.console import errors

FAILED, USER, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class State:
    """What the way to report an error depends on."""

    debug = False
    log: Path | None = None
    """The log of the run, once there is one."""
    resume = ""
    """What to say of going on later, once there is something to go on with."""


def _set_debug(value: bool) -> bool:
    State.debug = State.debug or value
    return value


Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error, and Prefect's log.")
]


def told(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with whatever it raises told as a sentence and turned into an exit code."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (typer.Exit, SystemExit):  # rich ends the process where a pipe is closed, as by `| head`
            raise
        except BaseException as error:  # Ctrl-C too, which typer would turn into a bare exit code
            raise typer.Exit(report(error)) from error

    return run


def report(error: BaseException) -> int:
    """Say what ended a command. Returns the exit code."""
    if State.debug and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    name = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        errors.print(f"Stopped. {State.resume}".rstrip())
        return INTERRUPTED
    if name in ("Terminated", "TerminationSignal"):
        errors.print(f"Stopped by SIGTERM. {State.resume}".rstrip())
        return TERMINATED
    if isinstance(error, ValueError):  # ConfigError, and what the rooms raise for input that a user can mend
        _say(str(error))
        _say_log()
        return USER
    if name == "StageFailed":
        _say(str(error))
        errors.print(f"Its log: {getattr(error, 'log', '')}", style="dim", soft_wrap=True)
        _say_log()
        return FAILED
    _say(f"{name}: {error}" if str(error) else name)
    _say_log()
    if not State.debug:
        errors.print("Run it again with --debug for the traceback.", style="dim")
    return FAILED


def _say(text: str) -> None:
    errors.print(f"[bold red]Error:[/] {_escaped(text)}", soft_wrap=True, highlight=False)


def _say_log() -> None:
    if State.log is not None and State.log.exists():
        errors.print(f"The run's log: {State.log}", style="dim", soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def flush() -> None:
    """Write out what was printed, before a hard end."""
    sys.stdout.flush()
    sys.stderr.flush()
