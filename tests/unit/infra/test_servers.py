"""How other processes find a server that was announced, on a stand-in for one."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra.machine import free_port
from infra.servers import STATE_FILE, Server, healthy, running_prefect_server, start_time


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    with Server("stand-in", command, {}, port=port, paths=("/api", "/"), log=tmp_path / "log") as started:
        yield started


def test_an_announced_server_is_found_until_it_stops(server: Server, tmp_path: Path) -> None:
    waits: list[float] = []
    assert server.wait_ready(on_wait=waits.append) == server.url
    assert waits
    server.announce(tmp_path / "state")
    assert running_prefect_server(tmp_path / "state") == server.url
    server.stop()
    assert running_prefect_server(tmp_path / "state") is None


def test_a_state_file_of_another_process_with_the_same_pid_is_stale(server: Server, tmp_path: Path) -> None:
    server.wait_ready()
    server.announce(tmp_path)
    state = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps({**state, "started": state["started"] - 1}))
    assert running_prefect_server(tmp_path) is None


def test_a_process_that_lives_but_does_not_answer_is_no_server(tmp_path: Path) -> None:
    me = {
        "url": "u",
        "health": f"http://127.0.0.1:{free_port()}/",
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
    }
    (tmp_path / STATE_FILE).write_text(json.dumps(me))
    assert running_prefect_server(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"pid": 999999999, "started": 1}'])
def test_a_damaged_state_file_is_no_server(tmp_path: Path, text: str) -> None:
    assert running_prefect_server(tmp_path) is None
    (tmp_path / STATE_FILE).write_text(text)
    assert running_prefect_server(tmp_path) is None


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such database')"]
    with (
        Server("stand-in", command, {}, port=free_port(), paths=("", "/"), log=tmp_path / "log") as server,
        pytest.raises(RuntimeError, match=r"did not start(.|\n)*no such database"),
    ):
        server.wait_ready()


@pytest.mark.parametrize("module", ["infra.launch", "infra.leases", "infra.servers", "infra.shipped", "infra.rank"])
def test_only_the_block_loads_prefect(module: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"prefect", "torch", "mlflow", "pydantic"} & set(loaded)


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What an HTTP proxy, that of the environment, was asked for; it answers for every server."""
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    for name in ("HTTP_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        yield asked
        proxy.shutdown()


def test_a_server_elsewhere_is_asked_by_the_proxy_of_the_environment(
    proxied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    assert healthy("http://mlflow.invalid/health")
    assert healthy(f"http://127.0.0.2:{port}/health")
    assert proxied == ["http://mlflow.invalid/health", f"http://127.0.0.2:{port}/health"]
    assert not healthy(f"http://127.0.0.1:{port}/health")
    assert not healthy(f"http://localhost:{port}/health")
    monkeypatch.setenv("NO_PROXY", "127.0.0.2")
    assert not healthy(f"http://127.0.0.2:{port}/health")
    assert len(proxied) == 2
