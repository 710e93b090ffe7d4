from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.approval import Approval, decided
from tasks import approval, tracking, unfinished
from tasks.approval import Waiting
from tasks.gates import GateResult
from tasks.promote import Consent, Judgement
from tasks.register import Registration
from tasks.stages import MANIFEST, StageRef


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / MANIFEST).write_text("{}")
    ref = StageRef("ppo", "f", "d", str(tmp_path / "ppo"), False, 1.5, {"kl": 2.0})
    made = Registration("chat-policy", 2, "chat-reward", 2, None, None, str(tmp_path), False)
    gate = GateResult("kl", "KL", "<= 15", True, 4.0, 3.0, 5.0, {})
    return Waiting({"ppo": ref, "evaluate": ref}, made, Judgement([gate], 1, "terms"), "run")


def test_a_run_comes_back_with_what_it_waited_with(waiting: Waiting, tmp_path: Path) -> None:
    assert approval.read(tmp_path, "id") is None
    approval.write(tmp_path, "id", waiting)
    came_back = approval.read(tmp_path, "id")
    assert came_back == waiting
    assert list(came_back.refs) == ["ppo", "evaluate"]
    said = Waiting(
        waiting.refs, waiting.registration, waiting.judgement, waiting.mlflow_run, Consent("approved", "Ann")
    )
    approval.write(tmp_path, "id", said)
    assert approval.read(tmp_path, "id") == said
    approval.forget(tmp_path, "id")
    assert approval.read(tmp_path, "id") is None


def test_a_run_whose_stages_are_gone_makes_them_again(waiting: Waiting, tmp_path: Path) -> None:
    approval.write(tmp_path, "id", waiting)
    (tmp_path / "ppo" / MANIFEST).unlink()
    assert approval.read(tmp_path, "id") is None


def test_a_candidate_whose_run_ended_waits_no_longer(
    waiting: Waiting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = tracking.open_store(tmp_path)
    for number in (1, 2, 3):
        tracking.register_version(store, "chat-policy", tmp_path, None, {"digest": str(number)})
        tracking.tag_version(store, "chat-policy", number, {"approval": "waiting: http://x"})
    tracking.set_alias(store, "chat-policy", "champion", 1)
    ends = {"a": "cancelled", "b": "failed", "c": "cancelled", "d": None, "e": "cancelled"}
    for (run_id, _), number in zip(ends.items(), (2, 3, 1, 1, 9), strict=True):  # there is no 9 any more
        of = replace(waiting.registration, policy_version=number)
        approval.write(tmp_path, run_id, replace(waiting, registration=of))
        unfinished.note(tmp_path, run_id, tmp_path / "ppo")
    (tmp_path / "ppo" / MANIFEST).unlink()
    approval.settle(store, tmp_path, ends.__getitem__)
    tags = {number: tracking.find_version(store, "chat-policy", number).tags for number in (1, 2, 3)}
    assert [tags[number]["approval"] for number in (1, 2, 3)] == ["waiting: http://x", "cancelled", "failed"]
    assert "but its run was cancelled while it waited for approval. Promote it with `rlhf" in tags[2]["verdict"]
    assert tags[2]["gate.kl"].startswith("passed: KL 4")
    assert "but its run failed before it was decided on" in tags[3]["verdict"]
    assert [path.name for folder in ("approvals", "unfinished") for path in (tmp_path / folder).iterdir()] == [
        "d.json",
        "d",
    ]
    champion = tracking.alias(store, "chat-policy", "champion")
    assert champion is not None
    assert champion.version == 1


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, Consent("undecided")),
        ({"decision": "approve", "comment": " fine ", "name": "Ann"}, Consent("approved", "Ann", "fine")),
        ({"decision": "reject"}, Consent("rejected", "somebody in Prefect's UI")),
    ],
)
def test_what_a_form_says(form: dict[str, Any], said: Consent) -> None:
    assert decided(Approval(**form)) == said


def test_where_to_decide_stands_at_the_version_while_it_waits() -> None:
    assert approval.where_to_decide({"approval": "waiting: http://x/1"}) == "http://x/1"
    assert approval.where_to_decide({"approval": "approved by Ann"}) is None
    assert approval.where_to_decide({}) is None
