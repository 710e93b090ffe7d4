import json
import signal
from pathlib import Path
from typing import Any

import pytest

from infra import launch
from infra.gpu import GpuInfrastructure
from infra.launch import Outcome
from tasks import launched, tracking
from tasks.config import ConfigError
from tasks.launched import StageFailed
from tasks.stages import RECORDS, Stage, StageRef, finished, read_manifest

LOG = Path("/records/worker.log")


def ended(code: int, *tail: str) -> Outcome:
    return Outcome(code, tail, 1.0)


@pytest.mark.parametrize("further", [False, True])
def test_user_errors_are_the_users(further: bool) -> None:
    told = {"kind": "user", "message": "lower batch_size"}
    error = launched.failure("sft", ended(2), told, LOG, further)
    assert isinstance(error, ConfigError)
    assert str(error) == "lower batch_size"


@pytest.mark.parametrize(
    ("kind", "further", "again"),
    [
        ("oom", True, False),
        ("nan", True, False),
        ("stopped", True, False),
        ("bug", False, False),
        ("bug", True, True),  # it came further than before: a broken link between ranks, not the code
    ],
)
def test_what_is_worth_another_try(kind: str, further: bool, again: bool) -> None:
    told = {"kind": kind, "message": "stopped at step 3 after a checkpoint", "resumes_at": None}
    error = launched.failure("ppo", ended(1), told, LOG, further)
    assert isinstance(error, StageFailed)
    assert (error.again, error.log) == (again, LOG)


def test_a_stalled_worker_is_tried_again_whatever_it_told_when_it_was_stopped() -> None:
    stalled = Outcome(75, ("stacks",), 1.0, stalled=True)
    error = launched.failure("ppo", stalled, {"kind": "stopped", "message": "stopped"}, LOG, False)
    assert isinstance(error, StageFailed)
    assert error.again
    with pytest.raises(StageFailed, match="said nothing for too long"):
        raise error


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (128 + signal.SIGKILL, r"was killed \(SIGKILL\).*out of memory"),
        (128 + signal.SIGSEGV, r"was ended by SIGSEGV; the end of its log: last words"),
        (7, r"ended with exit code 7 and no reason; the end of its log: last words"),
    ],
)
def test_a_worker_that_left_no_word_is_tried_again(code: int, sentence: str) -> None:
    error = launched.failure("sft", ended(code, "first", "last words", "  "), None, LOG, False)
    assert isinstance(error, StageFailed)
    assert error.again
    with pytest.raises(StageFailed, match=f"^sft {sentence}"):
        raise error


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is told to MLflow."""
    told: list[tuple[str, Any]] = []

    class Tracker:
        def __init__(self, uri: str, run_id: str) -> None:
            assert uri == STORE.uri
            self.run_id = run_id

        def log(self, step: int, metrics: Any) -> None:
            told.append(("metrics", (step, metrics)))

        def close(self) -> None:
            told.append(("sent", self.run_id))

    monkeypatch.setattr(tracking, "Tracker", Tracker)
    monkeypatch.setattr(tracking, "stage_run", lambda store, parent, name, out: told.append(("start", name)) or "run-1")
    monkeypatch.setattr(tracking, "end_run", lambda store, run, status: told.append(("end", status)))
    monkeypatch.setattr(tracking, "finish_stage", lambda store, run, ref, datasets: told.append(("finish", run)))
    monkeypatch.setattr(tracking, "link_cached", lambda store, parent, ref, name: told.append(("cached", name)))
    return told


STORE = tracking.Store("sqlite:////x.db", "/x", None, "e", "1")
CPU = GpuInfrastructure(device="cpu", processes_per_node=1)


def stage(workspace: Path) -> Stage:
    data = StageRef("tokenise", "f", "d", str(workspace / "tokenise"), True, 0.0, {})
    return Stage("sft", workspace, {"seed": 3}, {"data": data}, ("tasks.training.kl",))


def test_the_worker_is_told_all_and_its_report_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[tuple[str, Any]]
) -> None:
    given: dict[str, Any] = {}

    def worker(module: str, arguments: list[str], **options: Any) -> Outcome:
        records = Path(arguments[1]) / RECORDS
        assert not (records / "outcome.json").exists()
        given.update(
            json.loads((records / "config.json").read_text()),
            module=module,
            stage_argument=arguments[0],
        )
        options["on_progress"]({"step": 1, "total": 2, "metrics": {"loss": 0.5}})
        options["on_metrics"]({"step": 1, "metrics": {"sft/loss": 0.5}})
        (records / "report.json").write_text('{"perplexity": 2.5}')
        return ended(0)

    monkeypatch.setattr(launch, "run", worker)
    stale = stage(tmp_path).directory / RECORDS / "outcome.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"kind": "stopped"}')
    heard: list[Any] = []
    ref = launched.make(
        stage(tmp_path), CPU, STORE, "parent", name="sft", resumable=True, on_progress=lambda *told: heard.append(told)
    )
    assert given == {
        "stage": "sft",
        "config": {"seed": 3},
        "inputs": {"data": str(tmp_path / "tokenise")},
        "device": "cpu",
        "module": "tasks.worker",
        "stage_argument": "sft",
    }
    assert ref.metrics == {"perplexity": 2.5}
    assert heard == [(1, 2, {"loss": 0.5})]
    assert runs == [("start", "sft"), ("metrics", (1, {"sft/loss": 0.5})), ("sent", "run-1"), ("finish", "run-1")]
    again = launched.make(stage(tmp_path), CPU, STORE, "parent", name="sft")
    assert again.cached
    assert runs[4:] == [("cached", "sft")]


@pytest.mark.parametrize(("raised", "status"), [(None, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_worker_that_fails_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[tuple[str, Any]], raised: Any, status: str
) -> None:
    def worker(module: str, arguments: list[str], **options: Any) -> Outcome:
        if raised:
            raise raised
        return ended(0)  # well, it says, but it left no report

    monkeypatch.setattr(launch, "run", worker)
    with pytest.raises(raised or StageFailed):
        launched.make(stage(tmp_path), CPU, STORE, "parent", name="sft")
    assert runs == [("start", "sft"), ("sent", "run-1"), ("end", status)]
    assert finished(stage(tmp_path)) is None
    assert read_manifest(stage(tmp_path).directory) is None
