"""Prefect and MLflow servers that belong to the process that starts them, and are gone when it is gone.

`rlhf run` starts a Prefect server for the time of a run when none is configured, `rlhf ui` one of each. Prefect's own
temporary server outlives a killed flow; these have the supervisor of `infra.owned`. A server needs seconds to boot, so
starting returns at once and `wait_ready` waits:

    with prefect_server(log=path) as server:
        ...                            # verify the stages meanwhile
        url = server.wait_ready()

No server is imported here: they run in processes of their own and are asked over HTTP.
"""

import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from infra.machine import free_port
from infra.owned import OwnedProcess

HOST = "127.0.0.1"
API_URL = "PREFECT_API_URL"
STATE_FILE = "prefect-server.json"
WITHOUT_BLOCKS = {
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",  # the memory of it loads every integration, to compare
}
STOP_SECONDS = 5.0  # open browser tabs hold connections, for which a server would wait longer
OF_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy for the internet cannot reach these


class Server:
    """A server process: stops when the `with` block or this process ends."""

    def __init__(
        self,
        name: str,
        command: list[str],
        env: dict[str, str],
        *,
        port: int,
        paths: tuple[str, str],
        log: Path,
        cwd: Path | None = None,
    ):
        """Starts at once. `paths` are those of the address that users need and of the health check."""
        self.name, self.log = name, log
        self.url = f"http://{HOST}:{port}{paths[0]}"
        self._health = f"http://{HOST}:{port}{paths[1]}"
        self._state: Path | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = OwnedProcess(command, env=env, cwd=cwd, output=output, grace_seconds=STOP_SECONDS)

    def wait_ready(self, timeout: float = 120.0, on_wait: Callable[[float], None] | None = None) -> str:
        """Waits until the server answers and returns its URL; `on_wait` hears the seconds waited, for a progress line.

        RuntimeError with the end of the log if the server ends or does not answer within `timeout` seconds.
        """
        started = time.monotonic()
        while not healthy(self._health):
            waited = time.monotonic() - started
            if self._process.exit_code is not None:
                raise RuntimeError(f"the {self.name} server did not start. The end of {self.log}:\n{self._tail()}")
            if waited > timeout:
                raise RuntimeError(f"the {self.name} server gave no answer in {timeout:.0f} s: see its log {self.log}.")
            if on_wait is not None:
                on_wait(waited)
            time.sleep(0.1)
        return self.url

    def runs(self) -> bool:
        """Whether its process has not ended."""
        return self._process.exit_code is None

    def announce(self, state_dir: Path) -> None:
        """Lets `running_prefect_server(state_dir)` of other processes find this server until it stops."""
        state_dir.mkdir(parents=True, exist_ok=True)
        self._state = state_dir / STATE_FILE
        draft = self._state.with_suffix(f".{os.getpid()}")
        pid = self._process.pid
        draft.write_text(json.dumps({"url": self.url, "health": self._health, "pid": pid, "started": start_time(pid)}))
        draft.replace(self._state)

    def stop(self) -> None:
        """Stops the server and waits until its processes are gone; stopping again does nothing."""
        if self._state is not None:
            self._state.unlink(missing_ok=True)
        self._process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def prefect_server(*, log: Path, port: int | None = None, blocks: bool = True) -> Server:
    """Starts a Prefect server on the database of PREFECT_HOME; its `url` is the API's.

    The UI is at the same address without `/api`. A setting that the environment makes wins over ours. Without `blocks`
    it boots a second faster, and leaves it to the next server to enter Prefect's own block types into the database.
    It is ready when it has its database and has built its routes: `/api/ready` is the last of them. `/api/health`
    answers before, and the first request after that waits for up to a second.
    """
    port = port or free_port()
    env = {
        "PREFECT_SERVER_API_PORT": str(port),  # with --port alone the UI goes on calling port 4200
        **_unless_set(
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
            PREFECT_UI_URL=f"http://{HOST}:{port}",  # what notifications link to
        ),
        **({} if blocks else WITHOUT_BLOCKS),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return Server("Prefect", command, env, port=port, paths=("/api", "/api/ready"), log=log)


def mlflow_server(*, store_uri: str, artifacts: Path, log: Path, port: int | None = None) -> Server:
    """Starts an MLflow server on that store (a SQLAlchemy URI) and artifact folder."""
    port = port or free_port()
    command = [
        *[sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"],
        *["--backend-store-uri", store_uri, "--default-artifact-root", str(artifacts)],
    ]
    # The job runner serves MLflow's GenAI features alone, and is three processes more.
    env = _unless_set(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    return Server("MLflow", command, env, port=port, paths=("", "/health"), log=log)


def model_server(*, name: str, folder: Path, log: Path, port: int | None = None) -> Server:
    """Starts an OpenAI-compatible server, transformers' own, for the one model `folder/name`.

    It loads nothing from the hub and runs no code of a model. `name` is what its clients call the model.
    """
    port = port or free_port()
    command = [
        *[sys.executable, "-m", "transformers.cli.transformers", "serve", name],
        *["--host", HOST, "--port", str(port)],
    ]
    env = {"HF_HUB_OFFLINE": "1"}
    return Server("model", command, env, port=port, paths=("", "/health"), log=log, cwd=folder)


def _unless_set(**defaults: str) -> dict[str, str]:
    return {name: value for name, value in defaults.items() if name not in os.environ}


def configured_url() -> str | None:
    """The Prefect API that the user has set, by the environment or in a profile."""
    if url := os.environ.get(API_URL):
        return url
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH", prefect_home() / "profiles.toml"))
    if not profiles.is_file() or not re.search(rf"^\s*{API_URL}\s*=", profiles.read_text(), re.MULTILINE):
        return None
    from prefect.settings import PREFECT_API_URL  # knows which profile is in use, and takes seconds to load

    return PREFECT_API_URL.value()


def prefect_home() -> Path:
    """Where Prefect keeps its database and settings."""
    return Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()


def running_prefect_server(state_dir: Path) -> str | None:
    """The API URL of the server that was announced there, if it still runs and answers."""
    try:
        state = json.loads((state_dir / STATE_FILE).read_text())
        if start_time(state["pid"]) != state["started"]:
            return None  # its process died without tidying up, and another one may have its pid now
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state["url"] if healthy(state["health"]) else None


def healthy(url: str) -> bool:
    """Whether a server answers there with success, asked by the environment's proxy unless it is on this machine."""
    own = urlsplit(url).hostname in OF_THIS_MACHINE
    opener = LOCAL if own else urllib.request.build_opener()
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:  # URLError is one
        return False


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid it names a process for good. OSError if gone."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
