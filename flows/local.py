"""Runs flows in this process, for the command line: with a Prefect server of its own where none is configured.

    with PrefectServer(logs) as server:      # starts at once and needs seconds
        ...                                  # imports and checks meanwhile
        with server.connected():
            retrain(config)

Nothing that is started here outlives this process.
"""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from infra import servers
from tasks.config import ConfigError

SECONDS_TO_SEND = 10.0


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what runs is closed in order."""


class PrefectServer:
    """The Prefect API of a local run: the configured one, one that `rlhf ui` runs, or a server of our own."""

    def __init__(self, logs: Path, quiet: bool = True) -> None:
        """Start a server if one is needed.

        Args:
            logs: folder of the server's log.
            quiet: keep Prefect's own log off the console, which is for progress.
        """
        self._quiet = quiet
        self._own: servers.Server | None = None
        self._ready: Future[str] | None = None
        self._url = servers.configured_url() or servers.running_prefect_server(state_dir())
        if self._url is None:
            self._own = servers.prefect_server(log=logs / "prefect-server.log", blocks=False)
            self._url = self._own.url
            # Asked from now on: it builds its routes when it is first asked, while this process imports the flow.
            asking = ThreadPoolExecutor(1, "prefect-server")
            self._ready = asking.submit(self._own.wait_ready)
            asking.shutdown(wait=False)
        os.environ[servers.API_URL] = self._url  # Prefect reads it at import
        os.environ.setdefault("DO_NOT_TRACK", "1")

    @contextmanager
    def connected(self) -> Iterator[str]:
        """Waits until the server answers; in the block, flows run on it."""
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        assert self._url is not None
        if self._ready is not None:
            self._ready.result()
        elif not servers.healthy(f"{self._url.rstrip('/')}/health"):
            raise ConfigError(
                f"the Prefect server {self._url} does not answer; start it, correct {servers.API_URL}, or unset it"
            )
        if self._quiet:
            _silence_console()
        # Heartbeats are for automations that find dead runs of deployments; their thread costs every flow a second.
        with temporary_settings({PREFECT_API_URL: self._url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            try:
                yield self._url
            finally:
                _send_what_waits()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._own is not None:
            self._own.stop()


@contextmanager
def heard() -> Iterator[bool]:
    """In the block, events go to the Prefect server that is configured or that `rlhf ui` runs. None is started for
    them: gives whether one answers, and else they go nowhere."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = servers.configured_url() or servers.running_prefect_server(state_dir())
    answers = url is not None and servers.healthy(f"{url.rstrip('/')}/health")
    with temporary_settings({PREFECT_API_URL: url if answers else None}):
        yield answers
        if answers:
            _silence_console()
            _send_what_waits()


def _silence_console() -> None:
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [logging.getLogger(), *map(logging.getLogger, logging.Logger.manager.loggerDict)]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(handler, PrefectConsoleHandler):
            handler.setLevel(logging.CRITICAL)


def _send_what_waits() -> None:
    """Logs and states that wait in this process: once the server is gone, Prefect would try for a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=SECONDS_TO_SEND, at_exit=False)


@contextmanager
def imported() -> Iterator[None]:
    """For a block of imports: nothing is collected in it, and what it leaves is passed over by later collections.

    Modules stay until the end. To look through them again and again takes a quarter of the time of their import.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def state_dir() -> Path:
    """Where a running server is announced: with the database that it serves."""
    return servers.prefect_home()


class RunFormatter(logging.Formatter):
    """Gives a record the name of the task run or flow run that it is from, or of its logger."""

    def format(self, record: logging.LogRecord) -> str:
        names = (getattr(record, "task_run_name", None), getattr(record, "flow_run_name", None), record.name)
        record.run = next(name for name in names if name)
        return super().format(record)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Everything that is logged in the block goes to a file, flows and tasks included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(RunFormatter("%(asctime)s  %(levelname)-7s  %(run)s  %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """In the block, SIGTERM raises Terminated instead of ending the process on the spot."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ui_servers(workspace: Path, prefect_port: int | None, mlflow_port: int | None) -> Iterator[dict[str, str]]:
    """Name -> address of the Prefect and MLflow servers on the stores of local runs; both end with the block.

    Where a store is a server's already, by PREFECT_API_URL or MLFLOW_TRACKING_URI, its address is given instead.
    """
    with ExitStack() as stack:
        addresses: dict[str, str] = {}
        started: list[tuple[str, servers.Server]] = []
        prefect_url = servers.configured_url() or servers.running_prefect_server(state_dir())
        if prefect_url is not None:
            addresses["Prefect"] = prefect_url.removesuffix("/api")
        else:
            server = servers.prefect_server(log=workspace / "logs" / "prefect-server.log", port=prefect_port)
            started.append(("Prefect", stack.enter_context(server)))
        from tasks import tracking  # MLflow takes seconds to load, while Prefect's server boots

        store = tracking.open_store(workspace)
        if store.is_local:
            assert store.artifacts is not None
            log = workspace / "logs" / "mlflow-server.log"
            server = servers.mlflow_server(
                store_uri=store.uri, artifacts=Path(store.artifacts), log=log, port=mlflow_port
            )
            started.append(("MLflow", stack.enter_context(server)))
        else:
            addresses["MLflow"] = tracking.redacted(store.uri)
        for name, server in started:
            addresses[name] = server.wait_ready().removesuffix("/api")
            if name == "Prefect":
                server.announce(state_dir())
        yield addresses
