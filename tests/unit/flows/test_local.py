import gc
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flows import local
from infra import servers
from tasks.config import ConfigError


class FakeServer:
    """In the place of a Prefect server."""

    url = "http://127.0.0.1:1/api"

    def __init__(self) -> None:
        self.stopped = 0

    def wait_ready(self) -> str:
        return self.url

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeServer]:
    made: list[FakeServer] = []

    def start(**options: Any) -> FakeServer:
        made.append(FakeServer())
        return made[-1]

    monkeypatch.setattr(servers, "prefect_server", start)
    monkeypatch.setattr(servers, "running_prefect_server", lambda folder: None)
    monkeypatch.setenv("PREFECT_API_URL", "")
    return made


def test_an_own_server_ends_with_the_block(
    started: list[FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with local.PrefectServer(tmp_path):
        assert os.environ["PREFECT_API_URL"] == FakeServer.url
        assert [server.stopped for server in started] == [0]
    monkeypatch.setenv("PREFECT_API_URL", "")
    with pytest.raises(KeyError), local.PrefectServer(tmp_path / "again"):
        raise KeyError
    assert [server.stopped for server in started] == [1, 1]


def test_a_configured_server_is_used(
    started: list[FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with local.PrefectServer(tmp_path) as server:
        assert started == []
        with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9/api does not answer"), server.connected():
            pass


def test_the_server_of_rlhf_ui_is_used(
    started: list[FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(servers, "running_prefect_server", lambda folder: "http://127.0.0.1:2/api")
    with local.PrefectServer(tmp_path):
        assert started == []
        assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:2/api"


def test_a_profile_without_an_address_configures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    assert servers.configured_url() is None
    (tmp_path / "profiles.toml").write_text('active = "a"\n[profiles.a]\nPREFECT_LOGGING_LEVEL = "INFO"\n')
    assert servers.configured_url() is None


def test_the_log_names_the_run(tmp_path: Path) -> None:
    logger = logging.getLogger("some.logger")
    with local.logged_to(tmp_path / "logs" / "run.log"):
        logger.warning("plain")
        logger.warning("of a task", extra={"flow_run_name": "the flow", "task_run_name": "the task"})
    logger.warning("after")
    plain, of_a_task = (tmp_path / "logs" / "run.log").read_text().splitlines()
    assert "some.logger  plain" in plain
    assert "the task  of a task" in of_a_task


def test_sigterm_is_an_exception_in_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(local.Terminated), local.terminated_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_imported_in_the_block_is_not_collected_again() -> None:
    gc.collect()
    before = gc.get_freeze_count()
    try:
        with local.imported():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
