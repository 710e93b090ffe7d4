"""The preparation on a Dask cluster of real worker processes, against the same in this process."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import spread, workers
from data_prep.demo import write_hub
from tasks import dag, tracking
from tasks.config import ConfigError, parse
from tasks.dag import Choice
from tasks.stages import StageRef

REPO = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    distributed = pytest.importorskip("distributed")
    with (
        pytest.MonkeyPatch.context() as patch,
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as local,
    ):
        patch.setenv("PYTHONPATH", str(REPO))
        yield local.scheduler_address


def pid_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), number**2


def test_shards_come_back_in_order_from_other_processes(cluster: str) -> None:
    with spread.over_cluster(cluster) as mapped:
        made = list(mapped(pid_and_square, range(40)))
        assert [square for _, square in made] == [number**2 for number in range(40)]
        assert os.getpid() not in {pid for pid, _ in made}
        with pytest.raises(ZeroDivisionError):
            list(mapped(divmod_of_zero, [1]))


def in_a_process_of_its_own(number: int) -> tuple[int, int]:
    return os.getpid(), workers.apart(os.getpid)


def test_a_large_set_stays_in_the_worker_that_has_it(cluster: str) -> None:
    """Dask's workers may have no children."""
    with spread.over_cluster(cluster) as mapped:
        assert all(worker == process for worker, process in mapped(in_a_process_of_its_own, range(2)))


def divmod_of_zero(number: int) -> int:
    return number // 0


def prepared(workspace: Path, hub: Path, cluster: str | None) -> dict[str, StageRef]:
    from flows.prepare import preparation

    data = {"hub": str(hub), "cluster": cluster}
    config = parse({"name": "t", "workspace": str(workspace), "data": data, "models": {"policy": {}}})
    store = tracking.open_store(dag.workspace(config))
    run_id = tracking.start_run(store, config, {}, "test")
    return preparation(config)(config, Choice(until="tokenise"), run_id)


@pytest.mark.slow
def test_the_same_rows_and_fingerprints_as_in_this_process(prefect: Any, cluster: str, tmp_path: Path) -> None:
    write_hub(tmp_path / "hub", seed=0, pairs=1500)
    here = prepared(tmp_path / "here", tmp_path / "hub", None)
    there = prepared(tmp_path / "there", tmp_path / "hub", cluster)
    assert len(here) == 2 * 6 + 4
    for key, ref in here.items():
        other = there[key]
        assert (other.fingerprint, other.digest, other.cached) == (ref.fingerprint, ref.digest, False), key
        assert {k: v for k, v in other.metrics.items() if k != "seconds"} == ref.metrics


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"data\.cluster: localhost is no address of a Dask scheduler"):
        parse({"data": {"cluster": "localhost"}})
