"""A workspace's copy at an address: what is fetched, what is made anew, and what a failure costs."""

import json
import uuid
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from data_prep import ledger
from tasks import dag, remote, stages
from tasks.config import ConfigError, parse
from tasks.stages import Stage


@pytest.fixture(params=["memory", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/runs" if request.param == "memory" else f"file://{tmp_path}/bucket/runs"


def stage(workspace: Path, address: str | None) -> Stage:
    return Stage("clean", workspace, {"source": "a"}, {}, ("tasks.remote",), address)


def work(directory: Path) -> dict[str, Any]:
    (directory / "deep").mkdir()
    (directory / "deep" / "rows.bin").write_bytes(b"rows" * 1000)
    (directory / "records" / "log.txt").write_text("said\n")
    return {"rows": 1000}


def never(directory: Path) -> dict[str, Any]:
    raise AssertionError("the stage was made anew")


def copies(address: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def test_another_machine_fetches_what_one_has_made(tmp_path: Path, address: str) -> None:
    made = stages.run(stage(tmp_path / "one", address), work)
    other = stage(tmp_path / "two", address)
    (other.directory / "checkpoints").mkdir(parents=True)  # of a try that was interrupted there
    found = stages.finished(other)
    assert found is not None
    assert (found.cached, found.digest, found.metrics) == (True, made.digest, {"rows": 1000})
    assert stages.run(other, never).directory == tmp_path / "two" / "clean" / made.fingerprint
    for name in ("deep/rows.bin", "records/log.txt", "manifest.json"):
        assert (found.directory / name).read_bytes() == (made.directory / name).read_bytes()
    assert sorted(path.name for path in found.directory.iterdir()) == ["deep", "manifest.json", "records"]
    assert not list(found.directory.parent.glob(".*.fetched"))


def test_without_a_remote_nothing_is_fetched(tmp_path: Path, address: str) -> None:
    stages.run(stage(tmp_path / "one", address), work)
    assert stages.finished(stage(tmp_path / "two", None)) is None


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_copy_is_made_anew_and_replaced(tmp_path: Path, address: str, damage: str) -> None:
    made = stages.run(stage(tmp_path / "one", address), work)
    files, root = fsspec.core.url_to_fs(address)
    rows = f"{root}/clean/{made.fingerprint}/deep/rows.bin"
    files.pipe_file(rows, b"else" * 1000) if damage == "changed" else files.rm_file(rows)
    again = stages.run(stage(tmp_path / "two", address), work)
    assert not again.cached
    assert files.cat_file(rows) == b"rows" * 1000
    assert stages.run(stage(tmp_path / "three", address), never).digest == made.digest


def test_a_stage_damaged_here_comes_from_the_remote(tmp_path: Path, address: str) -> None:
    made = stages.run(stage(tmp_path, address), work)
    (made.directory / "deep" / "rows.bin").write_bytes(b"else")
    assert stages.run(stage(tmp_path, address), never).cached
    assert (made.directory / "deep" / "rows.bin").read_bytes() == b"rows" * 1000


def test_a_copy_cut_short_is_no_copy_and_the_next_run_ends_it(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = fsspec.core.url_to_fs(address)
    whole, done = type(files).put_file, []

    def once(self: Any, *arguments: Any, **settings: Any) -> None:
        if done:
            raise TimeoutError("no answer")
        done.append(whole(self, *arguments, **settings))

    said: list[str] = []
    with monkeypatch.context() as cut:
        cut.setattr(type(files), "put_file", once)
        made = stages.run(stage(tmp_path / "one", address), work, on_wait=said.append)
    assert made.metrics == {"rows": 1000}
    (sentence,) = said
    assert sentence.startswith(
        f"the remote {address} failed (TimeoutError: no answer); what is finished is in the work"
    )
    assert len(copies(address)) == 1
    assert stages.finished(stage(tmp_path / "two", address)) is None
    assert stages.run(stage(tmp_path / "one", address), never).cached
    assert stages.run(stage(tmp_path / "two", address), never).digest == made.digest


def test_a_remote_that_does_not_answer_costs_no_work(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = fsspec.core.url_to_fs(address)
    unfinished = stage(tmp_path, address)
    (unfinished.directory / "checkpoints").mkdir(parents=True)

    def silent(*arguments: Any, **settings: Any) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(files), "cat_file", silent)
    with pytest.raises(remote.RemoteError, match="run again when it answers, or leave out remote"):
        stages.run(unfinished, never, resumable=True)
    assert (unfinished.directory / "checkpoints").is_dir()


def test_a_forged_manifest_writes_nowhere_else(tmp_path: Path, address: str) -> None:
    made = stages.run(stage(tmp_path / "one", address), work)
    files, root = fsspec.core.url_to_fs(address)
    path = f"{root}/clean/{made.fingerprint}/manifest.json"
    forged = json.loads(files.cat_file(path))
    forged["files"]["../../../out"] = {"bytes": 0, "sha256": ""}
    files.pipe_file(path, json.dumps(forged).encode())
    with pytest.raises(remote.RemoteError, match=r"names \.\./\.\./\.\./out, which leads out of its stage"):
        stages.finished(stage(tmp_path / "two", address))
    assert list((tmp_path / "two").rglob("*.bin")) == []


def test_a_stage_that_is_forced_replaces_its_copy(tmp_path: Path, address: str) -> None:
    made = stages.run(stage(tmp_path / "one", address), work)
    for _ in range(2):
        forced = stages.run(stage(tmp_path / "one", address), lambda out: work(out) | {"rows": 7}, force=True)
    assert not forced.cached
    copy = json.loads(copies(address)[f"clean/{made.fingerprint}/manifest.json"])
    assert copy["metrics"] == {"rows": 7}


def test_check_wants_a_place_that_can_be_written(tmp_path: Path, address: str) -> None:
    remote.check(address)
    assert list(copies(address)) == [".writable"]
    (tmp_path / "plain").write_text("")
    with pytest.raises(remote.RemoteError, match="plain"):
        remote.check(f"file://{tmp_path}/plain/runs")
    with pytest.raises(ConfigError, match=r"^remote: nothing://there cannot be opened: Protocol not known: nothing"):
        remote.check("nothing://there")


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            {"workspace": "s3://bucket/runs"},
            "workspace: s3://bucket/runs is an address; name a folder, since .* as remote",
        ),
        ({"remote": "/mnt/runs"}, "remote: name an address, such as s3://bucket/runs or file:///mnt/runs"),
        ({"remote": "s3://key:secret@bucket/runs"}, "remote: the address holds a login; give that by the environment"),
    ],
)
def test_addresses_that_the_config_refuses(tree: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}") as found:
        parse(tree)
    assert "secret" not in str(found.value)


def ledger_of(path: Path, homes: dict[int, tuple[str, bool]]) -> bytes:
    columns = [list(homes), [home for home, _ in homes.values()], [held_out for _, held_out in homes.values()]]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=ledger._SCHEMA), path)
    return path.read_bytes()


OLD = {1: ("a", False), 2: ("b", True)}
GREW = {1: ("a", False), 2: ("b", True), 3: ("c", True)}
MERGED = {1: ("a", False), 2: ("a", False)}  # what was held out may become a train row
WRONG = {1: ("a", True), 2: ("b", True)}  # what was trained on is held out
APART = {1: ("a", False), 4: ("d", False)}


@pytest.mark.parametrize(
    ("here", "there", "left"),
    [
        (None, OLD, OLD),
        (OLD, OLD, OLD),
        (OLD, GREW, GREW),
        (GREW, OLD, GREW),
        (OLD, MERGED, MERGED),
        (MERGED, OLD, MERGED),
        (OLD, APART, None),
        (GREW, MERGED, None),
        (OLD, {**WRONG, 3: ("c", True)}, None),
    ],
)
def test_the_ledger_follows_the_one_that_came_of_it(tmp_path: Path, here: Any, there: Any, left: Any) -> None:
    path, other = tmp_path / "here" / "ledger.parquet", ledger_of(tmp_path / "there.parquet", there)
    before = None if here is None else ledger_of(path, here)
    if left is None:
        with pytest.raises(ValueError, match="have both grown, apart"):
            ledger.follow(path, other)
        assert path.read_bytes() == before
    else:
        ledger.follow(path, other)
        assert path.read_bytes() == ledger_of(tmp_path / "left.parquet", left)
    assert [file.name for file in path.parent.iterdir()] == ["ledger.parquet"]


def test_the_ledger_is_replaced_when_nobody_here_writes_it(tmp_path: Path, address: str) -> None:
    config = parse({"workspace": str(tmp_path / "here"), "remote": address})
    mine, theirs = tmp_path / "here" / "ledger.parquet", tmp_path / "there" / "ledger.parquet"
    before, newer = ledger_of(mine, OLD), ledger_of(theirs, GREW)
    remote.store_file(address, theirs)
    following = Thread(target=dag.follow_ledger, args=(config,))
    with FileLock(tmp_path / "here" / ".ledger.parquet.lock"):  # as another process does that splits
        following.start()
        following.join(0.5)
        assert following.is_alive()
        assert mine.read_bytes() == before
    following.join(10)
    assert mine.read_bytes() == newer
    with dag.ledger_lock(tmp_path / "here"):  # as the split does itself
        ledger_of(mine, OLD)
        dag.follow_ledger(config)
    assert mine.read_bytes() == newer
