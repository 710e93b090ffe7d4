"""Two machines, which are network namespaces with a cable between them: DeepSpeed trains over both, and both are left
clean."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import launch
from infra.gpu import GpuInfrastructure
from tests.integration.test_engine import run_steps
from tests.ranks import PROGRAMS

pytestmark = pytest.mark.slow
SHELL = Path(__file__).parent / "programs" / "netns-shell"
ROOT = Path(__file__).parents[3]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The addresses of two hosts; each is in the namespace `rlhf-ADDRESS`, behind the interface `veth`."""
    net = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
    addresses = [f"{net}.1", f"{net}.2"]
    spaces = [f"rlhf-{address}" for address in addresses]
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", "veth", "netns", spaces[0], "type", "veth", "peer", "name", "veth", "netns", spaces[1])
    except subprocess.CalledProcessError as error:
        _remove(spaces)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    for space, address in zip(spaces, addresses, strict=True):
        ip("-n", space, "address", "add", f"{address}/24", "dev", "veth")
        ip("-n", space, "link", "set", "veth", "up")
        ip("-n", space, "link", "set", "lo", "up")
    yield addresses
    _remove(spaces)


def _remove(spaces: list[str]) -> None:
    for space in spaces:
        subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def infrastructure(hosts: list[str], **fields: Any) -> GpuInfrastructure:
    env = {"GLOO_SOCKET_IFNAME": "veth", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    return GpuInfrastructure(
        device="cpu", nodes=2, hosts=hosts, remote_shell=str(SHELL), secret_env=env, threads_per_process=1, **fields
    )


def test_a_training_over_two_hosts_is_that_of_two_ranks_of_one(hosts: list[str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "hosts", tmp_path / "ranks"
    ours.mkdir()
    theirs.mkdir()
    outcome = launch.run(
        f"{PROGRAMS}.engine_steps",
        [str(ours), "2", "20"],
        log=ours / "log",
        launch=infrastructure(hosts).launch(),
        env={"PYTHONPATH": str(ROOT)},
    )
    assert outcome.exit_code == 0, outcome.tail
    assert json.loads((ours / "result.json").read_text()) == run_steps(theirs, 2, 2, 20)


@pytest.mark.parametrize("how", ["SIGTERM to owner", "kill -9 to owner"])
def test_a_stop_reaches_both_hosts(start: Any, hosts: list[str], how: str) -> None:
    cell = start(1, "graceful", **launch_fields(hosts))
    cell.wait_for("ready.0", "ready.1")
    cell.end(how)
    cell.seconds_until_gone(8)
    assert cell.checkpoints() == ["checkpoint.0", "checkpoint.1"]


def test_a_host_that_fails_ends_the_other(start: Any, hosts: list[str]) -> None:
    outcome = start(1, "fails", **launch_fields(hosts)).outcome()
    assert outcome["exit_code"] == 3
    assert "the reason of the failure" in outcome["tail"]


def launch_fields(hosts: list[str]) -> dict[str, Any]:
    return {"nodes": 2, "hosts": hosts, "remote_shell": str(SHELL), "env": {"GLOO_SOCKET_IFNAME": "veth"}}
