import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows import local
from flows.cli import errors
from flows.cli.main import app
from tasks import tracking
from tasks.launched import StageFailed
from tasks.promote import promote

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"debug": False, "log": None, "resume": ""}.items():
        monkeypatch.setattr(errors.State, name, value)


@pytest.fixture
def file(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = """
import sys
from flows.cli.main import app
try:
    app(["--help"])
except SystemExit:
    pass
print(sorted({"torch", "prefect", "mlflow", "pydantic", "yaml", "pandas"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(
        name in done.stdout
        for name in ("run", "plan", "data", "doctor", "models", "compare", "promote", "rollback", "ui")
    )
    # CPU seconds, as wall time on a busy machine says nothing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--set", "ppo.klcoef=1"], "ppo.klcoef: unknown key; did you mean kl_coef?"),
        (["--set", "ppo.kl_coef=much"], "ppo.kl_coef: input should be a valid number"),
        (["--set", "nonsense"], "write it as path=value"),
        (["--set", "workspace=s3://bucket/runs"], "workspace: s3://bucket/runs is an address; name a folder"),
        (["--set", "infrastructure=one-gpu"], "one-gpu needs a GPU and this machine shows none"),
        (["--set", "models.policy=/nowhere"], "models.policy: there is no model folder /nowhere"),
        (["--set", "sft.engine.offload_optimizer=true"], "offload_optimizer needs zero_stage 1, 2 or 3"),
        (["--from", "sftt"], "--from sftt: unknown step; did you mean sft?"),
        (["--from", "reward"], "not finished: demo, download, clean, blend, split, base, tokenise, sft"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_bad_input_is_one_sentence_before_any_work(
    file: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: list[str], sentence: str
) -> None:
    monkeypatch.setattr(local, "PrefectServer", None)  # must not come to be called
    monkeypatch.setattr("tasks.plan.gpu_count", lambda: 0)
    result = call(command, file, *options)
    assert result.exit_code == errors.USER
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert not (file.parent / "workspace").exists()


def test_a_missing_config_names_the_nearest(file: Path) -> None:
    result = call("run", file.with_name("rnu.yaml"))
    assert result.exit_code == errors.USER
    assert "did you mean" in result.output


def test_debug_shows_the_traceback(file: Path) -> None:
    assert "Traceback" in call("plan", file, "--set", "ppo.klcoef=1", "--debug").output


def test_plan_shows_stages_and_reasons(file: Path) -> None:
    result = call("plan", file)
    assert result.exit_code == 0
    assert "download × 2" in result.output
    assert "after reward" in result.output
    assert "0 of 14 stages cached, 14 would run." in result.output


def test_usage_errors() -> None:
    assert call("run").exit_code == errors.USER
    assert call("runn").exit_code == errors.USER


def test_models_of_a_workspace_without_any(tmp_path: Path) -> None:
    result = call("models", "--workspace", tmp_path)
    assert result.exit_code == 0
    assert "No model is registered yet" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("promote", "chat", "1"), ("rollback", "chat"), ("compare", "chat", "chat@x")])
def test_moves_and_comparison_without_a_store(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = call(*command, "--workspace", tmp_path)
    assert result.exit_code == errors.USER
    assert "there is no MLflow store" in result.output


def test_lineage_writes_no_file_of_an_impact(tmp_path: Path) -> None:
    result = call("lineage", "--impact", "some/set", "--out", tmp_path / "x.svg", "--workspace", tmp_path)
    assert result.exit_code == errors.USER
    assert "--out writes what a model version was made from; leave it out with --impact" in result.output


def test_history_shows_every_move_one_by_hand_too(tmp_path: Path) -> None:
    store = tracking.open_store(tmp_path)
    for number in (1, 2):
        tracking.register_version(store, "chat-policy", tmp_path, None, {"digest": str(number)})
    promote(store, "chat-policy", 1, why="first of all")
    tracking.set_alias(store, "chat-policy", "champion", 2)
    said = " ".join(call("models", "--history", "--workspace", tmp_path).output.split())
    assert "chat-policy none → 1 promotion" in said
    assert "(first of all)" in said
    assert "chat-policy 1 → 2 by hand, unknown" in said
    assert "champion" in call("models", "--workspace", tmp_path).output
    result = call("rollback", "reward-x", "--workspace", tmp_path)
    assert result.exit_code == errors.USER
    assert "There is no registered policy reward-x" in result.output


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("do it so"), 2, "Error: do it so"),
        (StageFailed("ppo ran out of memory", Path("/records/worker.log")), 1, "Its log: /records/worker.log"),
        (KeyError("seed"), 1, "Run it again with --debug"),
        (KeyboardInterrupt(), 130, "Stopped. Run the same command again."),
        (local.Terminated(), 143, "Stopped by SIGTERM. Run the same command again."),
    ],
)
def test_how_a_command_ends(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, sentence: str) -> None:
    errors.State.resume = "Run the same command again."
    assert errors.report(error) == code
    assert sentence in capsys.readouterr().err


def test_markup_in_an_error_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    errors.report(ValueError("phases is [1, 2], not [/three]"))
    assert "phases is [1, 2], not [/three]" in capsys.readouterr().err
