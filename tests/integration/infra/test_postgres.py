"""The servers of infra/compose.yaml, by its own commands and settings, on a real PostgreSQL: eight runs at once."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.machine import free_port
from infra.owned import OwnedProcess
from infra.servers import Server
from tests import postgres

INFRA = Path(__file__).parents[3] / "infra"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    postgres.needed,
]
RLHF = Path(sys.executable).with_name("rlhf")
RUNS = 8
SMALL = ("--set", "data.demo={pairs: 200}")
UNTIL = "download"  # seven tasks a run, six of them at once
OF_THE_WORKER = "SELECT state_type FROM flow_run WHERE deployment_id IS NOT NULL"
SECRETS = {
    "POSTGRES_PASSWORD": "of-the-database",
    "PREFECT_AUTH": "team:of-prefect",
    "MLFLOW_PASSWORD": "of-mlflow-1234",
    "MLFLOW_SECRET_KEY": "signs-cookies",
}
TROUBLE = re.compile(r"database is locked|deadlock|could not serialize|too many clients|QueuePool limit|Traceback")


@dataclass
class Team:
    """The running servers."""

    prefect: Server
    mlflow: Server
    worker_command: list[str]
    worker_environment: dict[str, str]
    database: postgres.Postgres
    logs: list[Path]


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Postgres]:
    """A PostgreSQL that tells of no trouble by the end."""
    with postgres.running(SECRETS["POSTGRES_PASSWORD"]) as server:
        yield server
        assert not TROUBLE.search(server.log.read_text())


@pytest.fixture(scope="module")
def team(database: postgres.Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Prefect's and MLflow's server as compose.yaml starts them, with this machine's ports and folders for its own."""
    folder = tmp_path_factory.mktemp("team")
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    ports = {"prefect": free_port(), "mlflow": free_port()}

    def here(text: str) -> str:
        text = re.sub(r"\$\{(\w+):([-?])([^}]*)\}", lambda m: SECRETS.get(m[1], m[3] if m[2] == "-" else ""), str(text))
        text = text.replace("@postgres:5432", f"@127.0.0.1:{database.port}").replace("0.0.0.0", "127.0.0.1")
        text = text.replace("/etc/mlflow-auth.ini", str(folder / "mlflow-auth.ini"))
        text = text.replace("=/artifacts", f"={folder / 'artifacts'}")
        for name, own in (("prefect", "4200"), ("mlflow", "5000")):
            text = re.sub(rf"\b(localhost|{name}):{own}\b", f"127.0.0.1:{ports[name]}", text)
            text = re.sub(rf"^(--port=)?{own}$", rf"\g<1>{ports[name]}", text)
        return text

    def start(name: str, paths: tuple[str, str]) -> Server:
        command = [sys.executable, "-m", *map(here, services[name]["command"])]
        log = folder / f"{name}.log"
        return Server(name, command, environment(name), port=ports[name], paths=paths, log=log)

    def environment(name: str) -> dict[str, str]:
        return {key: here(value) for key, value in services[name]["environment"].items()}

    (folder / "mlflow-auth.ini").write_text(here((INFRA / "mlflow-auth.ini").read_text()))

    database.ask("postgres", f"CREATE DATABASE {services['postgres']['environment']['POSTGRES_DB']}")
    for statement in re.findall(r"^CREATE [^;]+;", (INFRA / "databases.sql").read_text(), re.MULTILINE):
        database.ask("postgres", statement)
    with ExitStack() as stack:
        prefect = stack.enter_context(start("prefect", ("/api", "/api/health")))
        mlflow = stack.enter_context(start("mlflow", ("", "/health")))
        prefect.wait_ready()
        mlflow.wait_ready()
        yield Team(
            prefect,
            mlflow,
            services["worker"]["command"],
            environment("worker"),
            database,
            [folder / "prefect.log", folder / "mlflow.log"],
        )


def status(url: str, login: str | None, body: dict[str, Any] | None = None) -> int:
    """The HTTP status of a request, with basic authentication as `user:password` or without."""
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_both_servers_ask_for_a_login(team: Team) -> None:
    prefect, mlflow = f"{team.prefect.url}/flows/count", f"{team.mlflow.url}/api/2.0/mlflow/registered-models/search"
    assert [status(prefect, login, {}) for login in (None, "team:wrong", SECRETS["PREFECT_AUTH"])] == [401, 401, 200]
    right = f"admin:{SECRETS['MLFLOW_PASSWORD']}"
    assert [status(mlflow, login) for login in (None, "admin:wrong", right)] == [401, 401, 200]


@pytest.fixture(scope="module")
def worker(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The log of a worker with a deployment in its pool, both by the commands and settings of compose.yaml."""
    folder = tmp_path_factory.mktemp("worker")
    config = [INFRA / "runs" / "demo.yaml", "--set", "name=run0", "--set", f"workspace={folder}", *SMALL]
    # Without events, by which the other runs would start it.
    deploy = [RLHF, "deploy", *config, "--name", "nightly", "--pool", "gpu", "--no-events"]
    subprocess.run(deploy, env={**os.environ, **team.worker_environment}, check=True, capture_output=True)
    log = folder / "worker.log"
    with log.open("ab") as output:
        command = [sys.executable, "-m", *team.worker_command]
        running = OwnedProcess(command, env=team.worker_environment, cwd=folder, output=output, grace_seconds=20)
    yield log
    running.stop()


@pytest.fixture(scope="module")
def eight(team: Team, worker: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Outputs of eight runs at once: one by the worker, three in a workspace of their own, four in one."""
    folder = tmp_path_factory.mktemp("runs")
    login = team.worker_environment["PREFECT_API_AUTH_STRING"]
    asked = {"state": {"type": "SCHEDULED"}, "parameters": {"until": UNTIL}}
    nightly = team.database.ask("prefect", "SELECT id FROM deployment").strip()
    assert status(f"{team.prefect.url}/deployments/{nightly}/create_flow_run", login, asked) == 201
    started = []
    for number in range(1, RUNS):
        workspace = folder / (f"own-{number}" if number % 2 == 0 else "shared")
        config = [INFRA / "runs" / "demo.yaml", "--set", f"name=run{number}", "--set", f"workspace={workspace}", *SMALL]
        started.append(
            subprocess.Popen(
                [RLHF, "run", *config, "--until", UNTIL],
                env={**os.environ, **team.worker_environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=500)[0] for process in started]
        end = time.monotonic() + 120
        while (state := team.database.ask("prefect", OF_THE_WORKER).strip()) not in ("COMPLETED", "FAILED", "CRASHED"):
            assert time.monotonic() < end, f"{state}: {worker.read_text()}"
            time.sleep(1)
    finally:
        for process in started:
            process.kill()  # without effect on one that has ended
    assert [process.returncode for process in started] == [0] * (RUNS - 1), outputs
    return [*outputs, worker.read_text()]


def test_eight_runs_at_once_are_all_kept_and_none_meets_a_lock(team: Team, eight: list[str]) -> None:
    kept = team.database.ask("prefect", "SELECT tags ->> 0, state_type FROM flow_run WHERE parent_task_run_id IS NULL")
    kept = sorted(line for line in kept.splitlines() if line.startswith("run"))
    assert kept == [f"run{number}|COMPLETED" for number in range(RUNS)]
    runs = team.database.ask(
        "mlflow", "SELECT t.value, r.status FROM runs r JOIN tags t USING (run_uuid) WHERE t.key = 'rlhf.name'"
    )
    assert sorted(runs.splitlines()) == [f"run{number}|FINISHED" for number in range(RUNS)]
    for text in (*eight, *(log.read_text() for log in team.logs)):
        assert not TROUBLE.search(text), text[-3000:]
        assert not any(secret in text for secret in SECRETS.values())
