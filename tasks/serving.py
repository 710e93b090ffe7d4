"""A registered model behind an OpenAI-compatible endpoint, `transformers serve`, that follows the alias which names it.

The server is pinned to one name, a link in a folder of ours to the model's folder. When the alias moves, the link is
turned to the other folder and the server told to drop what it has loaded: its port stays open, answers that are being
drawn come to their end, and the next request loads the other model.
"""

import json
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from infra.servers import LOCAL
from tasks import registered, tracking, untrusted
from tasks.tracking import Store, Version

SECONDS_TO_LOAD = 600.0


@dataclass(frozen=True)
class Target:
    """What is served: the version that a name means now."""

    version: Version
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.version.name} version {self.version.version}"


def target(store: Store, name: str) -> Target:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` means now, on this machine.

    Raises ValueError where it is not there, or holds what is never loaded.
    """
    version = tracking.named_version(store, name)
    folder = registered.as_stage(store, version, Path(store.workspace)).directory / "model"
    untrusted.check(folder)
    return Target(version, folder)


def point(link: Path, folder: Path) -> None:
    """Turn a link to a folder; whoever opens it sees the one or the other."""
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.symlink_to(folder.resolve())
    draft.replace(link)


def switch(url: str, link: Path, before: Target, after: Target) -> None:
    """Have the server answer with another model, under the name of the link.

    Where it cannot load it, the one before is put back, and OSError or ValueError says why.
    """
    point(link, after.folder)
    try:
        _load(url, link.name)
    except (OSError, ValueError):
        point(link, before.folder)
        _load(url, link.name)
        raise


def _load(url: str, name: str) -> None:
    """Have the server drop what it has loaded and load the model that its name means now."""
    _post(f"{url}/reset", {})
    for line in _post(f"{url}/load_model", {"model": name}).splitlines():  # server-sent events, of a 200 in any case
        event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
        if event.get("status") == "error":
            raise ValueError(f"the model server could not load it ({event.get('message')})")


def _post(url: str, body: object) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with LOCAL.open(request, timeout=SECONDS_TO_LOAD) as answer:
        return str(answer.read().decode())
