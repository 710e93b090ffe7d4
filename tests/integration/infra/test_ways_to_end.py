"""Nothing survives: every way to run a flow x every way to end it x every launcher, with real processes.

run by           ended by     launchers            the run's state and its message             then
-----------------------------------------------------------------------------------------------------------------------
process worker   Ctrl-C       torchrun, deepspeed  Crashed: "... its worker was stopped ..."   the same run, next worker
process worker   SIGTERM      torchrun, deepspeed  Crashed: "... its worker was stopped ..."   the same run, next worker
process worker   cancel       torchrun, deepspeed  Cancelled                                   a new run
process worker   kill -9      torchrun, deepspeed  Crashed: "... SIGKILL ..."                  the same run, at once
serve            Ctrl-C       torchrun, deepspeed  Crashed: "`rlhf serve` was stopped ..."     the same run, once served
serve            SIGTERM      torchrun, deepspeed  Crashed: "`rlhf serve` was stopped ..."     the same run, once served
serve            cancel       torchrun, deepspeed  Cancelled                                   a new run
serve            kill -9      torchrun, deepspeed  Crashed: "... SIGKILL ..."                  the same run, at once
plain script     Ctrl-C       torchrun, deepspeed  Crashed: "... an interrupt signal"          the command again
plain script     SIGTERM      torchrun, deepspeed  Crashed: "... a termination signal"         the command again
plain script     cancel       torchrun, deepspeed  Cancelled: "... was cancelled"              the command again
plain script     kill -9      torchrun, deepspeed  Crashed: "Its process was killed ..."       the command again

Ctrl-C reaches all processes of the terminal, SIGTERM the script, `rlhf serve` or the worker alone, kill -9 the flow's
process. In each of the 24 cells all ranks are gone within 30 s and leave their checkpoints, the state says what
happened, and the retry goes on from the checkpoints. The flow, `counting`, has one step, whose ranks count. Prefect's
server has a PostgreSQL: on SQLite, with three services at once, it stands still for more than a minute now and then.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra import servers
from infra.owned import kill_processes_with, processes_with
from tests import api, postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), postgres.needed]
PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[3]
RUN_COUNTING = (sys.executable, PROGRAMS / "run_counting.py")
SECONDS_TO_CLEAR = 30
AT_ONCE = 3
"""Services: most of a cell's time is spent in waiting."""
SERVICE, RANKS = "RLHF_TEST_SERVICE", "RLHF_TEST_RANKS"
"""Environment variables of all processes of a service, and of those below a step's supervisor."""
SAYS = {
    ("worker", "Ctrl-C"): "its worker was stopped",
    ("worker", "SIGTERM"): "its worker was stopped",
    ("worker", "cancel"): "",
    ("worker", "kill -9"): "SIGKILL",
    ("serve", "Ctrl-C"): "`rlhf serve` was stopped",
    ("serve", "SIGTERM"): "`rlhf serve` was stopped",
    ("serve", "cancel"): "",
    ("serve", "kill -9"): "SIGKILL",
    ("script", "Ctrl-C"): "an interrupt signal",
    ("script", "SIGTERM"): "a termination signal",
    ("script", "cancel"): "It was cancelled",
    ("script", "kill -9"): "Its process was killed",
}


class Service:
    """What runs the flows of some cells, one after the other: a script each, `rlhf serve`, or a worker."""

    def __init__(self, prefect_api: str, way: str, launcher: str, folder: Path) -> None:
        self.way, self.launcher, self.folder = way, launcher, folder
        self.name = folder.name  # of the deployment, and of the worker's pool
        self.process: subprocess.Popen[bytes] | None = None
        self.env = {
            **os.environ,
            SERVICE: str(folder),
            "PREFECT_API_URL": prefect_api,
            "PYTHONPATH": f"{ROOT}:{PROGRAMS}",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        }
        if way == "worker":
            assert self.start(*RUN_COUNTING, "deploy", self.name, self.name).wait(120) == 0, self.log()
            self.process = None

    def start(self, *command: Any) -> subprocess.Popen[bytes]:
        """Starts a command in a session of its own, as a terminal does."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                list(command), env=self.env, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
            )
        return self.process

    def needed(self) -> None:
        """Starts what serves the deployment, unless it runs."""
        if self.process is not None and self.process.poll() is None:
            return
        if self.way == "serve":
            self.start(*RUN_COUNTING, "serve", self.name)
        else:
            self.start(Path(sys.executable).with_name("prefect"), "worker", "start", "--pool", self.name)

    def log(self) -> str:
        return (self.folder / "log").read_text()[-3000:]

    def end(self) -> None:
        kill_processes_with(SERVICE, str(self.folder))
        if self.process is not None:
            self.process.wait()


class Cell:
    """One flow and its ranks, which leave their files in a folder."""

    def __init__(self, service: Service, prefect_api: str, how: str) -> None:
        self.service, self.api, self.how = service, prefect_api, how
        self.folder = service.folder / f"{service.name}-{how.replace(' ', '')}"
        self.folder.mkdir()
        self.fields = {"launcher": service.launcher, "processes": 2, "grace_seconds": 10}

    def start(self) -> None:
        """Asks for a run; a script is one."""
        if self.service.way == "script":
            self.service.start(*RUN_COUNTING, "script", self.folder, json.dumps(self.fields))
            return
        self.service.needed()
        named = {"name": {"any_": [self.service.name]}}
        wait_for(lambda: api.ask(self.api, "deployments/filter", deployments=named), self.service.log)
        api.start(self.api, self.service.name, folder=str(self.folder), fields=self.fields)

    def runs(self) -> list[dict[str, Any]]:
        """The runs of this cell, the oldest first."""
        every = api.ask(self.api, "flow_runs/filter", sort="EXPECTED_START_TIME_ASC")
        return [run for run in every if run["parameters"].get("folder") == str(self.folder)]

    def end(self) -> None:
        """Does to the run what the column `ended by` says."""
        assert self.service.process is not None
        if self.how == "Ctrl-C":
            os.killpg(self.service.process.pid, signal.SIGINT)
        elif self.how == "SIGTERM":
            self.service.process.terminate()
        elif self.how == "cancel":
            api.ask(self.api, f"flow_runs/{self.runs()[0]['id']}/set_state", state={"type": "CANCELLING"})
        else:
            (supervisor,) = [pid for pid in self.ranks() if b"supervisor.py" in cmdline(pid)]
            os.kill(int(Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)

    def messages(self, run_id: str, name: str) -> list[str]:
        """Of the states of that name that a run has had."""
        return [state["message"] or "" for state in api.states(self.api, run_id) if state["name"] == name]

    def ranks(self) -> list[int]:
        """The supervisor and what is below it."""
        return processes_with(RANKS, self.folder.name)

    def numbers(self, name: str) -> list[int]:
        """What both ranks wrote into their files of that name; nothing until both have."""
        paths = [self.folder / f"{name}.{rank}" for rank in range(2)]
        return [int(path.read_text()) for path in paths] if all(path.exists() for path in paths) else []

    def live_through(self) -> None:
        """Starts the run, ends it, starts it again, and sees that all is as the table says."""
        way, stopped = self.service.way, self.how in ("Ctrl-C", "SIGTERM")
        self.start()
        wait_for(lambda: self.numbers("counts"), self.service.log)
        self.end()
        asked = time.monotonic()
        wait_for(lambda: not self.ranks(), self.ranks, seconds=SECONDS_TO_CLEAR)
        reached = self.numbers("checkpoint")
        assert reached, (self.folder / "log").read_text()
        if way == "script" or stopped:
            assert self.service.process is not None
            self.service.process.wait(SECONDS_TO_CLEAR - (time.monotonic() - asked))

        (run,) = self.runs()
        name = "Cancelled" if self.how == "cancel" else "Crashed"
        told = wait_for(lambda: self.messages(run["id"], name), self.runs)
        assert SAYS[way, self.how] in told[0]

        anew = way == "script" or self.how == "cancel"
        self.start() if anew else self.service.needed()
        wait_for(lambda: self.numbers("done"), self.service.log)
        assert self.numbers("done") == reached
        wait_for(lambda: self.runs()[-1]["state_type"] == "COMPLETED", self.runs)
        assert len(self.runs()) == (2 if anew else 1)

    def clear(self) -> None:
        """Leaves nothing of a cell that failed to the next one."""
        unfinished = [run for run in self.runs() if run["state_type"] in ("SCHEDULED", "PENDING", "RUNNING")]
        for run in unfinished:
            api.ask(self.api, f"flow_runs/{run['id']}/set_state", state={"type": "CANCELLED"}, force=True)
        if unfinished:
            self.service.end()


def live_through(prefect_api: str, folder: Path, way: str, launcher: str, cells: dict[str, Future[None]]) -> None:
    """The cells of one way to run and one launcher, one after the other; what each came to goes into its future."""
    try:
        service = Service(prefect_api, way, launcher, folder)
    except BaseException as error:
        for told in cells.values():
            told.set_exception(error)
        return
    try:
        for how, told in cells.items():
            try:
                cell = Cell(service, prefect_api, how)
                try:
                    cell.live_through()
                finally:
                    cell.clear()
            except BaseException as error:
                told.set_exception(error)
            else:
                told.set_result(None)
    finally:
        service.end()


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a Prefect server on PostgreSQL."""
    log = tmp_path_factory.mktemp("prefect-on-postgres") / "server.log"
    with postgres.running("of-the-database") as database, pytest.MonkeyPatch.context() as patch:
        database.ask("postgres", "CREATE DATABASE prefect")
        address = f"{postgres.USER}:{database.password}@127.0.0.1:{database.port}"
        patch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"postgresql+asyncpg://{address}/prefect")
        server = servers.prefect_server(log=log)
        patch.undo()  # the services know the server alone
        with server:
            yield server.wait_ready()


@pytest.fixture(scope="module")
def lived_through(
    request: pytest.FixtureRequest, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str, str], Future[None]]]:
    """(way, how, launcher) of the tests to run -> what becomes of that cell; some are lived through at once."""
    here = [item for item in request.session.items if item.path == request.path]
    futures: dict[tuple[str, str, str], Future[None]] = {}
    for cell in (item.callspec.params for item in here):
        futures[cell["way"], cell["how"], cell["launcher"]] = Future()
    groups: dict[tuple[str, str], dict[str, Future[None]]] = {}
    for (way, how, launcher), told in futures.items():
        groups.setdefault((way, launcher), {})[how] = told
    pool = ThreadPoolExecutor(AT_ONCE)
    for (way, launcher), group in groups.items():
        folder = tmp_path_factory.mktemp(f"{way}-{launcher}")
        pool.submit(live_through, prefect_api, folder, way, launcher, group)
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize(("way", "how"), SAYS)
def test_nothing_survives_and_a_retry_goes_on(lived_through: Any, way: str, how: str, launcher: str) -> None:
    lived_through[way, how, launcher].result()


def wait_for(happened: Callable[[], Any], otherwise: Callable[[], Any] = str, seconds: float = 150) -> Any:
    """What `happened` returns as soon as that is something; fails with what `otherwise` returns."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)
    return found


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
