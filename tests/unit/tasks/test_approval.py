from pathlib import Path
from typing import Any

import pytest

from flows.approval import Approval, decided
from tasks import approval
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
    return Waiting({"ppo": ref, "evaluate": ref}, made, Judgement([gate], 1), "run")


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
