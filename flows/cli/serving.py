"""`rlhf serve-model`: a registered model for whoever speaks the OpenAI API."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli import console
from flows.cli.errors import Debug
from flows.cli.models import WORKSPACE, Workspace, needed_store

if TYPE_CHECKING:
    from tasks.serving import Target
    from tasks.tracking import Store

SECONDS_BETWEEN_LOOKS = 2.0


def serve_model(
    model: Annotated[str, typer.Argument(help="models:/chat-policy@champion, or a version.", show_default=False)],
    port: Annotated[int | None, typer.Option(help="Any free one if not given.")] = None,
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Answer the OpenAI API on this machine with a registered model, until Ctrl-C. Follows the alias when it moves."""
    from flows import local
    from infra import servers
    from tasks import serving

    store = needed_store(workspace)
    serves = serving.target(store, model)
    name = serves.version.name
    log = workspace / "logs" / "model-server.log"
    say = console.console.print
    with local.terminated_in_order(), tempfile.TemporaryDirectory(prefix="rlhf-serving-") as folder:
        link = Path(folder) / name
        serving.point(link, serves.folder)
        with servers.model_server(name=name, folder=Path(folder), log=log, port=port) as server:
            with console.console.status(f"loading {serves.title} ..."):
                url = server.wait_ready(timeout=serving.SECONDS_TO_LOAD)
            say(f'{serves.title}: {url}/v1, model "{name}". [dim]Ctrl-C ends it.[/]', soft_wrap=True)
            try:
                while server.runs():
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    serves = _follow(store, model, serves, link, url)
            except KeyboardInterrupt:
                say("Stopped.")
                return
    raise RuntimeError(f"the model server ended by itself; its log: {log}")


def _follow(store: "Store", model: str, serves: "Target", link: Path, url: str) -> "Target":
    """What is served from now on. A model that cannot be had leaves the one that serves in place."""
    from tasks import serving

    try:
        now = serving.target(store, model)
    except (ValueError, OSError) as error:
        console.errors.print(f"{serves.title} serves on: {error}", style="yellow", markup=False, soft_wrap=True)
        return serves
    if now.version.version != serves.version.version:
        serving.point(link, now.folder)
        serving.load(url, link.name)
        console.console.print(f"{now.title} answers now, instead of version {serves.version.version}.", soft_wrap=True)
    return now
