"""Shared by all tests: a Prefect server for those that ask for it, and an environment that is no user's."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import servers

FOREIGN = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "HF_ENDPOINT")


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No server, store or database of the machine's user is touched: Prefect gets a home of its own."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("DO_NOT_TRACK", "1")
        yield home


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: no Ctrl-C would reach them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def prefect_home(_own_environment: Path) -> Path:
    return _own_environment


@pytest.fixture(scope="session")
def prefect_api(prefect_home: Path) -> Iterator[str]:
    """The API of a Prefect server that lives as long as the session; it takes ten seconds to start."""
    with servers.prefect_server(log=prefect_home / "server.log") as server:
        yield server.wait_ready()


@pytest.fixture
def prefect(prefect_api: str) -> Iterator[str]:
    """Flows in the test run on the session's server."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    assert os.environ.get("PREFECT_API_URL") is None
    with temporary_settings({PREFECT_API_URL: prefect_api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield prefect_api


@pytest.fixture(scope="session")
def _group() -> Iterator[tuple[Any, dict[str, str]]]:
    """The device of a process group of one rank, which a process can have once, and the environment that it needs."""
    import torch.distributed as dist

    from tests.bench.process import start_alone

    before = dict(os.environ)
    device = start_alone("cpu")
    own = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()
    os.environ.update(before)
    yield device, own
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(_group: tuple[Any, dict[str, str]]) -> Iterator[Any]:
    """The CPU, under DeepSpeed as the one rank of a group, while a module's tests run."""
    device, own = _group
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        yield device
