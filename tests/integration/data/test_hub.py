"""Downloads by the real hub client from a local server: what it gets, what it survives, what it tells the user."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:
    from conftest import Hub  # type: ignore[import-not-found]
else:
    Hub = Any

REPO = Path(__file__).parents[3]
NAME = "Dahoas/rm-static"
TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
TOKEN = "hf_aTokenThatOpensTheGate"
# A process of its own, because the client reads its environment when it is imported.
PROGRAM = """
import json, sys
from pathlib import Path
from data_prep.sources import SourceSpec, download
name, revision, out = sys.argv[1:]
Path(out).mkdir()
try:
    print(json.dumps(download(SourceSpec(name, revision=revision or None), None, Path(out))))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""

# The step of a run: which commit is read is a part of its identity.
STEP = """
import json, sys
from tasks import dag, prepare, stages
from tasks.config import parse
name, revision, workspace = sys.argv[1:]
config = parse({"workspace": workspace, "data": {"sources": {name: {"revision": revision or None}}}})
node = dag.graph(config)["download:" + name]
try:
    stage = dag.stage(config, node, {})
    made = stages.run(stage, lambda out: prepare.work(stage, out))
    print(json.dumps({"cached": made.cached, "commit": stage.config["commit"], **made.metrics}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


def parquet(rows: int, text: str = "x") -> bytes:
    table = pa.table({column: [f"{column} {text} {row}" for row in range(rows)] for column in ("prompt", "chosen")})
    buffer = io.BytesIO()
    pq.write_table(table.append_column("rejected", table["chosen"]), buffer, compression="none")
    return buffer.getvalue()


def get(
    hub: Hub, home: Path, out: Path, revision: str = "", name: str = NAME, program: str = PROGRAM, **environment: str
) -> dict[str, Any]:
    """What a download gives, or its error as {"error", "text"}; `home` is the client's cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(REPO), **environment}
    command = [sys.executable, "-c", program, name, revision, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert TOKEN not in done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def files() -> dict[str, bytes]:
    return {TRAIN: parquet(20_000), TEST: parquet(50), "README.md": b"not asked for"}


def test_a_cut_connection_goes_on_where_it_broke(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    files[TRAIN] = parquet(60, "x" * 200_000)  # 36 MB: the client writes 10 MiB at a time
    commit = hub.commit(NAME, files)
    hub.cuts[TRAIN] = 2
    metrics = get(hub, tmp_path / "home", tmp_path / "out")
    assert metrics["rows"] == {"train": 60, "test": 50}
    assert metrics["revision"] == commit
    assert (tmp_path / "out" / "train" / "0000.parquet").read_bytes() == files[TRAIN]
    assert hub.ranges(TRAIN) == ["", f"bytes={10 * 2**20}-", f"bytes={20 * 2**20}-"]
    assert not any(path.endswith("README.md") for _, path, _ in hub.asked)


def test_a_set_with_its_files_at_the_root_and_others_beside_them(hub: Hub, tmp_path: Path) -> None:
    here = {TRAIN.removeprefix("data/"): parquet(6), TEST.removeprefix("data/"): parquet(2)}
    hub.commit(NAME, {**here, "validation-00000-of-00001.parquet": parquet(4), "data/notes.parquet": parquet(1)})
    assert get(hub, tmp_path / "home", tmp_path / "out")["rows"] == {"train": 6, "test": 2}
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}
    assert fetched == set(here)


def test_a_set_in_no_layout_that_is_known(hub: Hub, tmp_path: Path) -> None:
    hub.commit(NAME, {"pairs.parquet": parquet(6)})
    missing = get(hub, tmp_path / "home", tmp_path / "out")
    assert missing["error"] == "ValueError"
    assert "of the split train (data/train-*.parquet, train-*.parquet, */train/*.parquet)" in missing["text"]


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    hub.commit(NAME, files)
    hub.too_many[TRAIN] = 2
    assert get(hub, tmp_path / "home", tmp_path / "out")["rows"] == {"train": 20_000, "test": 50}
    assert hub.too_many[TRAIN] == 0


def test_a_hub_that_stays_busy_or_down_is_worth_another_try(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    hub.commit(NAME, files)
    hub.too_many["revision"] = 99
    busy = get(hub, tmp_path / "home", tmp_path / "out")
    assert busy["error"] == "ConnectionError"
    assert "429" in busy["text"]
    hub.url = "http://127.0.0.1:9"  # discard: nobody listens
    down = get(hub, tmp_path / "home", tmp_path / "out2")
    assert down["error"] == "ConnectionError"
    assert "name a mirror folder with data.hub" in down["text"]


def test_a_gated_set_asks_for_a_token_and_opens_with_it(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    hub.commit(NAME, files)
    hub.gated[NAME] = TOKEN
    refused = get(hub, tmp_path / "home", tmp_path / "out")
    assert refused["error"] == "ValueError"
    assert "is gated: accept its terms on the hub and set HF_TOKEN" in refused["text"]
    assert get(hub, tmp_path / "home", tmp_path / "out2", HF_TOKEN=TOKEN)["rows"]["train"] == 20_000


def test_a_set_that_changes_on_the_way_comes_from_one_commit(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    first = hub.commit(NAME, files)
    changed = {TRAIN: parquet(7, "new"), TEST: parquet(3, "new")}
    hub.after_revision = lambda: hub.commit(NAME, changed)
    metrics = get(hub, tmp_path / "home", tmp_path / "out")
    assert (metrics["revision"], metrics["rows"]) == (first, {"train": 20_000, "test": 50})
    # The next download sees the change, a pinned one does not.
    newer = get(hub, tmp_path / "home", tmp_path / "out2")
    assert newer["rows"] == {"train": 7, "test": 3}
    assert newer["revision"] == hub.branches[NAME, "main"] != first
    assert get(hub, tmp_path / "home", tmp_path / "out3", first)["rows"]["train"] == 20_000


def test_offline_reads_what_was_downloaded_and_nothing_else(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    commit = hub.commit(NAME, files)
    nothing = get(hub, tmp_path / "home", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert nothing["error"] == "ConnectionError"
    assert "go online" in nothing["text"]
    get(hub, tmp_path / "home", tmp_path / "out2")
    hub.asked.clear()
    assert get(hub, tmp_path / "home", tmp_path / "out3", HF_HUB_OFFLINE="1")["revision"] == commit
    assert hub.asked == []


def test_an_unknown_revision_and_a_branch_with_slashes(hub: Hub, tmp_path: Path) -> None:
    name = "stanfordnlp/SHP"
    table = pa.table({column: ["x"] for column in ("post_id", "history", "human_ref_A", "human_ref_B")})
    table = table.append_column("labels", [[1]]).append_column("score_ratio", [[2.0]])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    shards = {f"default/{split}/0000.parquet": buffer.getvalue() for split in ("train", "validation", "test")}
    commit = hub.commit(name, shards, branch="refs/convert/parquet")
    assert get(hub, tmp_path / "home", tmp_path / "out", name=name)["revision"] == commit
    missing = get(hub, tmp_path / "home", tmp_path / "out2", "v9", name=name)
    assert missing["error"] == "ValueError"
    assert "The hub has no stanfordnlp/SHP (revision v9): correct the source's revision" in missing["text"]


def test_a_run_notices_new_data_and_else_downloads_nothing(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    first = hub.commit(NAME, files)

    def run(**options: str) -> dict[str, Any]:
        hub.asked.clear()
        return get(hub, tmp_path / "home", tmp_path / "workspace", program=STEP, **options)

    made = run()
    assert (made["cached"], made["commit"], made["revision"]) == (False, first, first)
    again = run()
    assert (again["cached"], again["commit"]) == (True, first)
    assert [path.rpartition("/")[2] for _, path, _ in hub.asked] == ["main"], "one question: what is main?"
    second = hub.commit(NAME, {TRAIN: parquet(7, "new"), TEST: parquet(3, "new")})
    newer = run()
    assert (newer["cached"], newer["revision"], newer["rows"]) == (False, second, {"train": 7, "test": 3})
    pinned = run(revision=first)
    assert (pinned["commit"], pinned["rows"]["train"]) == (first, 20_000)
    assert run(revision=first)["cached"]
    assert hub.asked == [], "a commit needs no question"
    # Without the hub, a run goes on with what was downloaded last.
    assert run(HF_HUB_OFFLINE="1") == {**newer, "cached": True}
    assert hub.asked == []
    hub.too_many["revision"] = 99
    assert run() == {**newer, "cached": True}


def test_a_branch_that_moves_between_the_question_and_the_download(
    hub: Hub, tmp_path: Path, files: dict[str, bytes]
) -> None:
    first = hub.commit(NAME, files)
    hub.after_revision = lambda: hub.commit(NAME, {TRAIN: parquet(7, "new"), TEST: parquet(3, "new")})
    made = get(hub, tmp_path / "home", tmp_path / "workspace", program=STEP)
    assert (made["commit"], made["revision"], made["rows"]["train"]) == (first, first, 20_000)


def test_a_run_of_a_set_that_is_not_to_be_had(hub: Hub, tmp_path: Path, files: dict[str, bytes]) -> None:
    missing = get(hub, tmp_path / "home", tmp_path / "workspace", program=STEP)
    assert missing["error"] == "ValueError"
    assert "The hub has no Dahoas/rm-static (revision main)" in missing["text"]
    hub.url = "http://127.0.0.1:9"  # discard: nobody listens
    assert get(hub, tmp_path / "home", tmp_path / "workspace", program=STEP)["error"] == "ConnectionError"
