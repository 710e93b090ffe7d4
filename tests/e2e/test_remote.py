"""Two machines that share an object store and no disk: a real S3 server, and a workspace for each."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from tasks.stages import read_manifest

pytestmark = pytest.mark.slow
Rlhf = Callable[..., Any]
ADDRESS = "s3://runs/nightly"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """The filesystem of a server that has the bucket of `ADDRESS`; its login stands in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    login = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**login, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir("runs")
        yield files
    server.stop()


def run(rlhf: Rlhf, workspace: Path, address: str = ADDRESS, until: str = "sft") -> Any:
    places = ("--set", f"workspace={workspace}", "--set", f"remote={address}")
    return rlhf("run", *places, "--until", until).end()


def test_a_second_machine_makes_nothing_anew(rlhf: Rlhf, bucket: Any, tmp_path: Path) -> None:
    first = run(rlhf, tmp_path / "one")
    assert first.code == 0, first.output
    second = run(rlhf, tmp_path / "two")
    assert second.code == 0, second.output
    made, fetched = (
        {path.parent.name: path.parent for path in (tmp_path / machine).glob("*/*/manifest.json")}
        for machine in ("one", "two")
    )
    assert set(made) == set(fetched)
    assert {manifest["stage"] for directory in fetched.values() if (manifest := read_manifest(directory))} >= {
        *("download", "clean", "blend", "split", "base", "tokenise", "sft", "data-report")
    }
    for name, directory in made.items():
        files = {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        assert all((fetched[name] / path).read_bytes() == data for path, data in files.items())
    assert "= sft" in second.output
    assert "✓" not in second.output
    ledgers = [(tmp_path / machine / "ledger.parquet").read_bytes() for machine in ("one", "two")]
    assert ledgers[0] == ledgers[1] == bucket.cat_file("runs/nightly/ledger.parquet")


def test_a_bucket_that_is_not_there_is_told_before_any_work(rlhf: Rlhf, bucket: Any, tmp_path: Path) -> None:
    ended = run(rlhf, tmp_path, "s3://nobody/nightly")
    assert ended.code != 0
    assert "the remote s3://nobody/nightly failed (FileNotFoundError: there is no nobody; create it)" in " ".join(
        ended.output.split()
    )
    assert "Traceback" not in ended.output
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in ended.output
    assert not list(tmp_path.glob("*/*/manifest.json"))
