"""The servers of infra/compose.yaml, by its own commands and settings, on a real PostgreSQL: eight runs at once."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
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

INFRA = Path(__file__).parents[3] / "infra"
BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(BINARIES is None, reason="needs PostgreSQL (Debian: apt install postgresql)"),
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
    psql: Any
    logs: list[Path]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a PostgreSQL of the module's own, with the user and the databases that compose.yaml names."""
    assert BINARIES is not None
    folder = Path(tempfile.mkdtemp(prefix="rlhf-postgres-"))  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    owner: dict[str, Any] = {"cwd": folder, "check": True, "capture_output": True, "text": True}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        owner |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    (folder / "password").write_text(SECRETS["POSTGRES_PASSWORD"])
    (folder / "password").chmod(0o644)
    port = free_port()

    def run(name: str, *arguments: str) -> None:
        subprocess.run([str(BINARIES.with_name(name)), *arguments], **owner)

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "rlhf", "--auth=scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield port
        assert not TROUBLE.search((folder / "log").read_text())
    finally:
        run("pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def team(postgres: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Prefect's and MLflow's server as compose.yaml starts them, with this machine's ports and folders for its own."""
    folder = tmp_path_factory.mktemp("team")
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    ports = {"prefect": free_port(), "mlflow": free_port()}

    def here(text: str) -> str:
        text = re.sub(r"\$\{(\w+):([-?])([^}]*)\}", lambda m: SECRETS.get(m[1], m[3] if m[2] == "-" else ""), str(text))
        text = text.replace("@postgres:5432", f"@127.0.0.1:{postgres}").replace("0.0.0.0", "127.0.0.1")
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

    def psql(database: str, query: str) -> str:
        assert BINARIES is not None
        command = [BINARIES.with_name("psql"), "-h", "127.0.0.1", "-p", str(postgres), "-U", "rlhf", "-d", database]
        env = {**os.environ, "PGPASSWORD": SECRETS["POSTGRES_PASSWORD"]}
        return subprocess.run([*command, "-Atc", query], env=env, check=True, capture_output=True, text=True).stdout

    psql("postgres", f"CREATE DATABASE {services['postgres']['environment']['POSTGRES_DB']}")
    for statement in re.findall(r"^CREATE [^;]+;", (INFRA / "databases.sql").read_text(), re.MULTILINE):
        psql("postgres", statement)
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
            psql,
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
    nightly = team.psql("prefect", "SELECT id FROM deployment").strip()
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
        while (state := team.psql("prefect", OF_THE_WORKER).strip()) not in ("COMPLETED", "FAILED", "CRASHED"):
            assert time.monotonic() < end, f"{state}: {worker.read_text()}"
            time.sleep(1)
    finally:
        for process in started:
            process.kill()  # without effect on one that has ended
    assert [process.returncode for process in started] == [0] * (RUNS - 1), outputs
    return [*outputs, worker.read_text()]


def test_eight_runs_at_once_are_all_kept_and_none_meets_a_lock(team: Team, eight: list[str]) -> None:
    kept = team.psql("prefect", "SELECT tags ->> 0, state_type FROM flow_run WHERE parent_task_run_id IS NULL")
    kept = sorted(line for line in kept.splitlines() if line.startswith("run"))
    assert kept == [f"run{number}|COMPLETED" for number in range(RUNS)]
    runs = team.psql(
        "mlflow", "SELECT t.value, r.status FROM runs r JOIN tags t USING (run_uuid) WHERE t.key = 'rlhf.name'"
    )
    assert sorted(runs.splitlines()) == [f"run{number}|FINISHED" for number in range(RUNS)]
    for text in (*eight, *(log.read_text() for log in team.logs)):
        assert not TROUBLE.search(text), text[-3000:]
        assert not any(secret in text for secret in SECRETS.values())
