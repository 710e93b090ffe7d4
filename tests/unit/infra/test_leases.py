"""Who gets which GPU: on lock files alone, with a stand-in for nvidia-smi."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import leases
from infra.leases import FOLDER, holders, leased

PROGRAM = """
import sys
from infra.leases import leased
with leased(["0", "1"], int(sys.argv[1]), holder="the other run", on_wait=print):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "leases"))
    monkeypatch.setattr(leases, "SECONDS_BETWEEN_TRIES", 0.02)
    return tmp_path / "leases"


@pytest.fixture
def other() -> object:
    """(count) -> another process that holds so many of GPU 0 and 1."""
    started: list[subprocess.Popen[str]] = []

    def start(count: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(count)],
            cwd=Path(__file__).parents[3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in started:
        with process:
            process.kill()


Other = Callable[[int], "subprocess.Popen[str]"]


def test_two_runs_get_different_gpus(other: Other) -> None:
    other(1)
    with leased(["0", "1"], 1, holder="me") as lease:
        assert lease.gpus == ("1",)
        assert holders(["0", "1"]) == {"0": "the other run", "1": "me"}
    assert holders(["0", "1"]) == {"0": "the other run"}


@pytest.mark.parametrize("end", [lambda process: process.stdin.close(), lambda process: process.kill()])
def test_the_second_says_for_whom_it_waits_and_goes_on_when_the_first_ends(
    other: Other, end: Callable[["subprocess.Popen[str]"], None]
) -> None:
    first = other(2)
    said: list[str] = []

    def wait(sentence: str) -> None:
        said.append(sentence)
        end(first)

    with leased(["0", "1"], 1, holder="me", on_wait=wait) as lease:
        assert lease.gpus == ("0",)
    assert said[0] == ("waiting for 1 free GPU: GPU 0 is held by the other run, GPU 1 is held by the other run")


def test_who_waits_holds_nothing(other: Other) -> None:
    first = other(1)
    free_meanwhile: list[bool] = []

    def wait(sentence: str) -> None:
        free_meanwhile.append("1" not in holders(["1"]))
        first.kill()

    with leased(["0", "1"], 2, holder="me", on_wait=wait) as lease:
        assert lease.gpus == ("0", "1")
    assert free_meanwhile[0]


def test_a_forked_child_that_lives_on_keeps_no_lease() -> None:
    with leased(["0"], 1, holder="me"):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        assert holders(["0"]) == {}
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_an_index_and_a_uuid_are_one_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "gpu_uuids", lambda: ["GPU-aaa", "GPU-bbb"])
    with leased(["1"], 1, holder="me"):
        assert holders(["GPU-bbb"]) == {"GPU-bbb": "me"}
        assert [path.name for path in folder.iterdir()] == ["GPU-bbb.lock"]


def test_every_user_may_lock_the_files(folder: Path) -> None:
    with leased(["0"], 1, holder="me"):
        assert (folder / "0.lock").stat().st_mode & 0o777 == 0o666
        assert folder.stat().st_mode & 0o7777 == 0o1777


def test_no_gpu_no_lease(folder: Path) -> None:
    with leased([], 0, holder="me") as lease:
        assert lease.gpus == ()
    assert not folder.exists()
