import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep import workers
from data_prep.clean import clean
from data_prep.sources import SourceSpec, download
from infra.owned import processes_with


def test_what_a_process_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        workers.apart(int, "x")


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(RuntimeError, match="kill was ended with code -9"):
        workers.apart(kill, signal.SIGKILL)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_map_over_cores_is_a_map() -> None:
    with workers.over_cores() as mapped:
        pids = list(mapped(pid, range(40)))
        assert set(pids[: workers.CALLS_BEFORE_PROCESSES]) == {os.getpid()}
        assert os.getpid() not in pids[workers.CALLS_BEFORE_PROCESSES :]
        assert os.getpid() not in mapped(pid, range(2))  # the processes are there
        assert list(mapped(abs, iter(range(-50, 0)))) == list(range(50, 0, -1))
        with pytest.raises(ZeroDivisionError):
            list(mapped(inverse, range(50, -1, -1)))


def pid(_: int) -> int:
    return os.getpid()


def inverse(number: int) -> float:
    return 1 / number


def test_a_set_cleaned_apart_has_the_same_bytes(demo_hub: Path, tmp_path: Path) -> None:
    spec, raw = SourceSpec("stanfordnlp/SHP"), tmp_path / "raw"
    raw.mkdir()
    download(spec, str(demo_hub), raw)
    for name in ("here", "apart"):
        (tmp_path / name).mkdir()
    here, apart = clean(spec, raw, tmp_path / "here"), workers.apart(clean, spec, raw, tmp_path / "apart")
    assert here == apart
    for side in ("train", "test"):
        assert (tmp_path / "here" / f"{side}.arrow").read_bytes() == (tmp_path / "apart" / f"{side}.arrow").read_bytes()


def test_a_pause_ends_with_the_run() -> None:
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(workers.pause, 60)
        with pytest.raises(KeyboardInterrupt), workers.stopped_together():
            raise KeyboardInterrupt
        with pytest.raises(RuntimeError, match="the run is being stopped"):
            waits.result(5)
    with workers.stopped_together():  # as a later run of this process begins
        workers.pause(0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(number: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import threading, time
        from data_prep import workers
        if __name__ == "__main__":
            with workers.stopped_together():
                threading.Thread(target=workers.apart, args=(time.sleep, 600)).start()
                time.sleep(600)
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(Path(workers.__file__).parents[1]), "WORKERS_TEST": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, program], env=env)
    give_up = time.monotonic() + 60
    while len(processes_with("WORKERS_TEST", str(tmp_path))) < 3 and time.monotonic() < give_up:
        time.sleep(0.1)  # the parent, multiprocessing's tracker, the worker
    time.sleep(1)
    started = processes_with("WORKERS_TEST", str(tmp_path))
    parent.send_signal(number)
    parent.wait(30)
    assert len(started) >= 3
    give_up = time.monotonic() + 10
    while processes_with("WORKERS_TEST", str(tmp_path)) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert processes_with("WORKERS_TEST", str(tmp_path)) == []
