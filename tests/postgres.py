"""A PostgreSQL of a test module's own, from Debian's packages."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.machine import free_port

BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)
needed = pytest.mark.skipif(BINARIES is None, reason="needs PostgreSQL (Debian: apt install postgresql)")
USER = "rlhf"


@dataclass(frozen=True)
class Postgres:
    """A running server; everything belongs to USER, who has the password."""

    port: int
    password: str
    log: Path

    def ask(self, database: str, query: str) -> str:
        """Answer of `psql`, a line per row with `|` between the columns."""
        assert BINARIES is not None
        command = [BINARIES.with_name("psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database]
        env = {**os.environ, "PGPASSWORD": self.password}
        return subprocess.run([*command, "-Atc", query], env=env, check=True, capture_output=True, text=True).stdout


@contextmanager
def running(password: str) -> Iterator[Postgres]:
    """Starts a server in a folder of its own; both are gone at the end."""
    assert BINARIES is not None
    folder = Path(tempfile.mkdtemp(prefix="rlhf-postgres-"))  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    owner: dict[str, Any] = {"cwd": folder, "check": True, "capture_output": True, "text": True}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        owner |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)
    port, data, log = free_port(), str(folder / "data"), folder / "log"

    def run(name: str, *arguments: str) -> None:
        subprocess.run([str(BINARIES.with_name(name)), *arguments], **owner)

    run("initdb", "-D", data, "-U", USER, "--auth=scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run("pg_ctl", "-D", data, "-w", "-l", str(log), "-o", options, "start")
    try:
        yield Postgres(port, password, log)
    finally:
        run("pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
        shutil.rmtree(folder)
