"""What reads models or data of a workspace holds off `rlhf prune` meanwhile."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows import retrain
from flows.cli.main import app
from infra import servers
from tasks import chat, prune, registered, serving, tracking
from tasks.config import parse
from tasks.tracking import Store, Version


class SeenError(Exception):
    """The end of a test that has seen what it is about."""


@pytest.fixture
def probe(tmp_path: Path) -> Callable[..., Any]:
    """Stands for what reads: raises SeenError where the workspace is held."""

    def probe(*_: Any, **__: Any) -> None:
        if held(tmp_path / "workspace"):
            raise SeenError

    return probe


def held(workspace: Path) -> bool:
    with (workspace / prune.LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def test_a_run_before_it_names_a_registered_model(
    tree: dict[str, Any], probe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered, "pinned", probe)
    with pytest.raises(SeenError):
        retrain.retrain.fn(parse(tree))


def test_a_look_at_the_data(
    tree: dict[str, Any], tmp_path: Path, probe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(registered, "pinned", probe)
    assert "SeenError" in CliRunner().invoke(app, ["data", str(tmp_path / "run.yaml"), "--debug"]).output


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of a workspace with a policy and its reward model."""
    (tmp_path / "workspace").mkdir()
    store = tracking.open_store(tmp_path / "workspace")
    for name in ("chat-reward", "chat-policy"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
        tags = {"digest": name, "input.reward.digest": "chat-reward"}
        tracking.register_version(store, name, tmp_path / name, None, tags)
    return store


@pytest.mark.parametrize(("asks", "loads"), [(chat.speaker, "Speaker"), (chat.judge, "Judge")])
def test_a_chat_while_it_loads(
    store: Store, probe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, asks: Callable[..., Any], loads: str
) -> None:
    monkeypatch.setattr(chat, loads, probe)
    with pytest.raises(SeenError):
        asks("models:/chat-policy/1", store)
    assert not held(Path(store.workspace))


def test_an_endpoint_while_it_loads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Path(store.workspace)
    seen: list[tuple[str, bool]] = []
    targets = iter(serving.Target(Version("chat-policy", n, (), {}, "", None, 0.0), workspace) for n in (1, 2))

    class Server(servers.Server):
        def __init__(self) -> None: ...

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *_: Any) -> None: ...

        def wait_ready(self, *_: Any, **__: Any) -> str:
            seen.append(("loads", held(workspace)))
            return ""

        def runs(self) -> bool:
            seen.append(("serves", held(workspace)))
            return len(seen) < 4

    monkeypatch.setattr(servers, "model_server", lambda **_: Server())
    monkeypatch.setattr(serving, "target", lambda *_: next(targets))
    monkeypatch.setattr(serving, "switch", lambda *_: seen.append(("switches", held(workspace))))
    monkeypatch.setattr("flows.cli.serving.time", SimpleNamespace(sleep=lambda _: None))
    CliRunner().invoke(app, ["serve-model", "models:/chat-policy@champion", "--workspace", str(workspace)])
    assert seen == [("loads", True), ("serves", False), ("switches", True), ("serves", False)]


def test_a_workspace_that_may_only_be_read_is_read() -> None:
    with prune.in_use(Path("/proc/self")):  # nobody makes a file there
        assert not (Path("/proc/self") / prune.LOCK).exists()
