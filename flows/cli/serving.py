"""`rlhf serve-model`: a registered model for whoever speaks the OpenAI API."""

import tempfile
import time
from contextlib import ExitStack
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
LONGEST_WAIT = 60.0
"""Between looks, while they fail."""


def serve_model(
    model: Annotated[str, typer.Argument(help="models:/chat-policy@champion, or a version.", show_default=False)],
    port: Annotated[int | None, typer.Option(help="Any free one if not given.")] = None,
    workspace: Workspace = WORKSPACE,
    debug: Debug = False,
) -> None:
    """Answer the OpenAI API on this machine with a registered model, until Ctrl-C. Follows the alias when it moves."""
    from flows import local
    from infra import servers
    from tasks import prune, serving

    store = needed_store(workspace)
    log = workspace / "logs" / "model-server.log"
    say = console.console.print
    with (
        local.terminated_in_order(),
        tempfile.TemporaryDirectory(prefix="rlhf-serving-") as folder,
        ExitStack() as loading,
    ):
        loading.enter_context(prune.in_use(Path(store.workspace)))
        serves = serving.target(store, model)
        name = serves.version.name
        link = Path(folder) / name
        serving.point(link, serves.folder)
        with servers.model_server(name=name, folder=Path(folder), log=log, port=port) as server:
            with console.console.status(f"loading {serves.title} ..."):
                url = server.wait_ready(timeout=serving.SECONDS_TO_LOAD)
            loading.close()
            say(f'{serves.title}: {url}/v1, model "{name}". [dim]Ctrl-C ends it.[/]', soft_wrap=True)
            try:
                wait = SECONDS_BETWEEN_LOOKS
                while server.runs():
                    time.sleep(wait)
                    now = followed(store, model, serves, link, url)
                    wait = SECONDS_BETWEEN_LOOKS if now else min(2 * wait, LONGEST_WAIT)
                    serves = now or serves
            except KeyboardInterrupt:
                say("Stopped.")
                return
    raise RuntimeError(f"the model server ended by itself; its log: {log}")


def followed(store: "Store", model: str, serves: "Target", link: Path, url: str) -> "Target | None":
    """What is served from now on; None, with the reason shown, if that could not be found out or the new model not be
    loaded. Then what serves serves on, and this is to be tried again."""
    from tasks import prune, serving

    try:
        with prune.in_use(Path(store.workspace)):
            now = serving.target(store, model)
            if now.version.version != serves.version.version:
                serving.switch(url, link, serves, now)
                console.console.print(
                    f"{now.title} answers now, instead of version {serves.version.version}.", soft_wrap=True
                )
    except Exception as error:  # MLflow's are no ValueError, and nothing that goes wrong here is a reason to stop
        console.errors.print(f"{serves.title} serves on: {error}", style="yellow", markup=False, soft_wrap=True)
        return None
    return now
