"""The registry with real processes, servers and models: what the unit tests of tracking and promotion leave out."""

import json
import os
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from infra.machine import free_port
from infra.servers import LOCAL, Server, mlflow_server
from tasks import gates, history, tracking
from tasks.config import RunConfig
from tasks.promote import Judgement
from tasks.tracking.mlmodel import describe_model

ROOT = Path(__file__).parents[2]
OPEN = """
from pathlib import Path
from tasks import tracking
print(tracking.open_store(Path({workspace!r})).experiment_id)
"""
PROMOTE = """
import sys
from pathlib import Path
from tasks import promote, tracking
store = tracking.open_store(Path({workspace!r}))
print(promote.promote(store, "race-policy", {number}).promoted)
"""
REGISTER = """
import sys
from pathlib import Path
from tasks import tracking
store = tracking.open_store(Path({workspace!r}))
print(tracking.register_version(store, "race-policy", Path({workspace!r}), None, {{"digest": {digest!r}}}))
"""


@pytest.fixture(autouse=True)
def _no_store_of_the_machine(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def workspace(template, tmp_path) -> Path:
    """A workspace with a fresh store."""
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "mlflow.db").write_bytes((Path(template.workspace) / "mlflow.db").read_bytes())
    return tmp_path / "workspace"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking.open_store(tmp_path_factory.mktemp("template"))


def at_once(programs: list[str]) -> list[str]:
    """What programs print that run at the same time; all have to end well."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-c", p], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for p in programs
    ]
    ended = [(process, *process.communicate(timeout=200)) for process in running]
    assert [process.returncode for process, _, _ in ended] == [0] * len(programs), [errors for _, _, errors in ended]
    return [printed.strip() for _, printed, _ in ended]


def test_three_processes_open_a_fresh_store_at_once(tmp_path):
    workspace = tmp_path / "new" / "workspace"
    ids = at_once([OPEN.format(workspace=str(workspace))] * 3)
    assert len(set(ids)) == 1
    with sqlite3.connect(workspace / "mlflow.db") as database:
        assert database.execute("select count(*) from experiments where name = 'rlhf-flows'").fetchone() == (1,)
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert sorted(path.name for path in workspace.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_two_processes_register_the_same_digest_once(workspace):
    numbers = at_once(
        [REGISTER.format(workspace=str(workspace), digest=digest) for digest in ("same", "same", "other")]
    )
    assert numbers[0] == numbers[1] != numbers[2]
    assert len(tracking.versions(tracking.open_store(workspace), "race-policy")) == 2


@pytest.mark.slow
def test_ten_processes_promote_at_once(workspace):
    store = tracking.open_store(workspace)
    for number in range(1, 11):
        tracking.register_version(store, "race-policy", workspace, None, {"digest": str(number)})
    programs = [PROMOTE.format(workspace=str(workspace), number=number) for number in range(1, 11)]
    assert at_once(programs) == ["True"] * 10
    moves = history.moves(store, "race-policy")
    assert sorted(move.after for move in moves) == list(range(1, 11))
    assert [move.before for move in moves] == [None, *(move.after for move in moves[:-1])]
    assert tracking.alias(store, "race-policy", tracking.CHAMPION).version == moves[-1].after
    assert tracking.alias(store, "race-policy", tracking.PREVIOUS).version == moves[-2].after


def test_older_database_is_migrated_and_a_copy_kept(workspace):
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    database = workspace / "mlflow.db"
    config = _get_alembic_config(f"sqlite:///{database}")
    command.downgrade(config, "-1")
    with sqlite3.connect(database) as connection:
        older = connection.execute("select version_num from alembic_version").fetchone()
    store = tracking.open_store(workspace)
    with sqlite3.connect(database) as connection:
        assert connection.execute("select version_num from alembic_version").fetchone() != older
    with sqlite3.connect(workspace / "mlflow.db.before-migration") as connection:
        assert connection.execute("select version_num from alembic_version").fetchone() == older
    assert tracking.registered_names(store) == []


def test_database_of_a_newer_mlflow_is_left_as_it_is(workspace):
    database = workspace / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")
    connection.close()
    before = database.read_bytes()
    with pytest.raises(ValueError, match=r"was made by another MLflow .* move it away"):
        tracking.open_store(workspace)
    assert database.read_bytes() == before


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """A policy and a reward model of a few weights, as plain Hugging Face folders by pipeline."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "red": 2, "apple": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    shape = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, num_labels=1, pad_token_id=0, eos_token_id=1)
    folders = {}
    for pipeline, model_class in (
        ("text-generation", LlamaForCausalLM),
        ("text-classification", LlamaForSequenceClassification),
    ):
        folders[pipeline] = tmp_path_factory.mktemp(pipeline)
        model_class(config).save_pretrained(folders[pipeline] / "model")
        tokenizer.save_pretrained(folders[pipeline] / "model")
    return folders


@pytest.mark.parametrize("pipeline", ["text-generation", "text-classification"])
def test_described_folder_loads_in_mlflow_and_in_transformers(pipeline, tiny_models, workspace):
    import mlflow
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_models[pipeline]
    describe_model(folder, pipeline, "red apple")
    store = tracking.open_store(workspace)
    tracking.register_version(store, "tiny", folder, None, {"digest": "a"})
    tracking.set_alias(store, "tiny", tracking.CHAMPION, 1)
    mlflow.set_tracking_uri(store.uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/tiny@champion")
    finally:
        mlflow.set_tracking_uri(None)
    answer = loaded.predict(["red apple"])
    if pipeline == "text-generation":
        assert isinstance(answer[0], str)
        assert AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters() > 0
    else:
        assert 0 <= float(answer["score"].iloc[0]) <= 1
        assert AutoModelForSequenceClassification.from_pretrained(folder / "model").config.num_labels == 1
    assert AutoTokenizer.from_pretrained(folder / "model").pad_token == "<pad>"


@pytest.mark.slow
def test_mlflow_serves_the_champion_over_http(tiny_models, workspace, tmp_path):
    folder = tiny_models["text-generation"]
    describe_model(folder, "text-generation", "red apple")
    store = tracking.open_store(workspace)
    tracking.register_version(store, "tiny-policy", folder, None, {"digest": "a"})
    tracking.set_alias(store, "tiny-policy", tracking.CHAMPION, 1)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny-policy@champion"]
    command += ["--env-manager", "local", "--port", str(port)]
    # It starts `uvicorn` by name, so the environment has to be an activated one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"MLFLOW_TRACKING_URI": store.uri, "PATH": path}
    with Server("model", command, env, port=port, paths=("/invocations", "/ping"), log=tmp_path / "log") as server:
        question = (folder / "serving_input_example.json").read_bytes()
        request = urllib.request.Request(server.wait_ready(), question, {"Content-Type": "application/json"})
        with LOCAL.open(request, timeout=60) as answer:
            (said,) = json.load(answer)["predictions"]
    assert said.startswith("red apple")


def test_watching_a_worker_and_describing_its_model_loads_no_torch(tiny_models):
    program = (
        "import sys; from pathlib import Path; from tasks import launched; from tasks.tracking import mlmodel; "
        f"mlmodel.describe_model(Path({str(tiny_models['text-generation'])!r}), 'text-generation', 'red'); "
        "print('torch' in sys.modules)"
    )
    assert at_once([program]) == ["False"]


@pytest.mark.usefixtures("prefect")
def test_promotion_is_a_flow_with_both_outcomes(workspace, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    from flows.promotion import promotion, rollback

    def gate(passed: bool) -> gates.GateResult:
        return gates.GateResult("kl", "KL", "<= 15", passed, 4.0, 3.0, 5.0, {})

    store = tracking.open_store(workspace)
    for digest in ("a", "b"):
        tracking.register_version(store, "pair-policy", workspace, None, {"digest": digest})
    assert promotion("pair", 1, str(workspace), Judgement([gate(True)], None)).promoted
    state = promotion("pair-policy", 2, str(workspace), Judgement([gate(False)], 1), return_state=True)
    assert not state.result().promoted
    assert tracking.alias(store, "pair-policy", tracking.CHAMPION).version == 1
    assert promotion("pair", 2, str(workspace)).promoted
    assert tracking.alias(store, "pair-policy", tracking.CHAMPION).version == 2
    assert rollback("pair", 2, str(workspace), "worse in practice").promoted
    assert tracking.alias(store, "pair-policy", tracking.CHAMPION).version == 1
    with pytest.raises(ValueError, match="pair-policy has no version 5; it has 1, 2"):
        promotion("pair", 5, str(workspace))
    with get_client(sync_client=True) as client:
        ours = FlowRunFilter(name={"any_": ["promote-pair-1", "promote-pair-2", "promote-pair-5", "roll-back-pair-2"]})
        runs = {run.name: run.state.name for run in client.read_flow_runs(flow_run_filter=ours)}
        shown = {artifact.key for artifact in client.read_artifacts(flow_run_filter=ours)}
    assert runs["promote-pair-2"] == "Completed"
    assert runs["promote-pair-5"] == "Failed"
    assert runs["roll-back-pair-2"] == "Completed"
    assert {"promotion", "gates", "rollback"} <= shown


@pytest.mark.slow
def test_models_are_uploaded_to_a_server_that_refuses_folders(workspace, tmp_path, monkeypatch, tiny_models):
    local = tracking.open_store(workspace)
    folder = tiny_models["text-generation"]
    with mlflow_server(store_uri=local.uri, artifacts=tmp_path / "served", log=tmp_path / "log") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.wait_ready())
        store = tracking.open_store(workspace)
        run_id = tracking.start_run(store, RunConfig(), {})
        tracker = tracking.Tracker(store.uri, run_id)
        tracker.log(1, {"sft/loss": 1.0})
        tracker.close()
        assert tracking.register_version(store, "served-policy", folder, run_id, {"digest": "a"}) == 1
        assert tracking.register_version(store, "served-policy", folder, run_id, {"digest": "a"}) == 1
        assert not tracking.find_version(store, "served-policy", 1).source.startswith(folder.as_uri())
        from mlflow import MlflowClient

        client = MlflowClient(store.uri)
        assert client.get_run(run_id).data.metrics == {"sft/loss": 1.0}
        tracking.fetch_version(store, tracking.find_version(store, "served-policy", 1), tmp_path / "fetched")
        weights = Path("model", "model.safetensors")
        assert (tmp_path / "fetched" / weights).read_bytes() == (folder / weights).read_bytes()
        assert tracking.run_url(store, run_id).startswith(f"{store.uri}/#/experiments/")
