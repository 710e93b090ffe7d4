"""What an endpoint does where the registry is down or the server cannot load the new champion: it answers on."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.cli.serving import followed
from tasks import serving
from tasks.serving import Target
from tasks.tracking import Store, Version


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """What the server serves: a link to version 1; version 2 is whole as well, version 3 cannot be loaded."""
    for number in (1, 2, 3):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "3" / "broken").touch()
    serving.point(tmp_path / "chat-policy", tmp_path / "1")
    return tmp_path / "chat-policy"


@pytest.fixture
def server(link: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that speaks as `transformers serve`, and the folders that it loaded."""
    loaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            events = [{"status": "ok"}]
            if self.path == "/load_model":
                events = [{"status": "loading"}, {"status": "ready"}]
                if (link / "broken").exists():
                    events[-1] = {"status": "error", "message": "header too large"}
                else:
                    loaded.append(link.resolve().name)
            self.send_response(200)
            self.end_headers()
            self.wfile.write("".join(f"data: {json.dumps(event)}\n\n" for event in events).encode())

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", loaded
    http.shutdown()


def target(link: Path, number: int) -> Target:
    return Target(Version("chat-policy", number, (), {}, "", None, 0.0), link.parent / str(number))


def test_a_model_that_cannot_be_loaded_leaves_the_one_before(link, server, monkeypatch, capsys):
    url, loaded = server
    store = Store("", str(link.parent), None, "", "")
    champion = 2
    monkeypatch.setattr(serving, "target", lambda *_: target(link, champion))
    assert followed(store, "models:/chat-policy@champion", target(link, 1), link, url) == target(link, 2)
    champion = 3
    assert followed(store, "models:/chat-policy@champion", target(link, 2), link, url) is None
    assert (link.resolve().name, loaded) == ("2", ["2", "2"])
    shown = " ".join(capsys.readouterr().err.split())
    assert "version 2 serves on: the model server could not load it (header too large)" in shown
    (link.parent / "3" / "broken").unlink()  # tried again, it can be loaded
    assert followed(store, "models:/chat-policy@champion", target(link, 2), link, url) == target(link, 3)
    assert loaded[-1] == "3"


def test_an_outage_of_mlflow_is_no_end(link, server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    url, loaded = server
    store = Store("http://127.0.0.1:1", str(link.parent), None, "", "")  # where nothing listens
    assert followed(store, "models:/chat-policy@champion", target(link, 1), link, url) is None
    assert (link.resolve().name, loaded) == ("1", [])
    assert "version 1 serves on: API request to http://127.0.0.1:1" in " ".join(capsys.readouterr().err.split())
