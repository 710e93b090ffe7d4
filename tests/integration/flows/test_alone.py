"""A flow run that is started twice: real processes that hold it, and die."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort
from prefect.runtime import flow_run

from flows.alone import alone

HOLD = """
import sys, time
from pathlib import Path
from flows.alone import alone
with alone(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def first(tmp_path: Path) -> subprocess.Popen[str]:
    """The first start of the run `twice`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "twice"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_start_ends_and_leaves_the_state_to_the_first(
    prefect: str, first: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.alone.SECONDS_TO_WAIT", 0.1)
    ids: list[str] = []

    @flow
    def second() -> None:
        ids.append(flow_run.id)
        with alone(tmp_path, "twice"):
            raise AssertionError("two are at work")

    with pytest.raises(Abort):
        second()
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(ids[0]).state.type.value == "RUNNING"


def test_a_start_after_a_kill_goes_on(first: subprocess.Popen[str], tmp_path: Path) -> None:
    first.send_signal(signal.SIGKILL)
    with alone(tmp_path, "twice"):
        pass
    assert list((tmp_path / "running").iterdir()) == []
