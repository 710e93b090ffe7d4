import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from tasks import tracking
from tasks.config import RunConfig, parse
from tasks.stages import Stage, StageRef, run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        return tracking.open_store(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(autouse=True)
def _no_store_of_the_machine(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


@pytest.fixture
def parent(store):
    return tracking.start_run(store, RunConfig(), {})


def client(store):
    from mlflow import MlflowClient

    return MlflowClient(store.uri)


def made(
    workspace: Path, name: str, metrics: dict, inputs: dict[str, StageRef] | None = None, run_id_of=None
) -> StageRef:
    def work(directory: Path) -> dict:
        (directory / "out.txt").write_text(name)
        if run_id_of:
            run_id_of(directory)
        return metrics

    return run(Stage(name, workspace, {name: {"epochs": 2}}, inputs or {}, ()), work)


def test_store_lies_in_the_workspace_and_opens_again(store):
    workspace = Path(store.workspace)
    assert store.uri == f"sqlite:///{workspace}/mlflow.db"
    assert (workspace / "mlflow.db").is_file()
    assert tracking.open_store(workspace) == store


def test_tracking_uri_of_the_environment_wins_and_becomes_absolute(store, tmp_path, monkeypatch):
    shutil.copyfile(Path(store.workspace) / "mlflow.db", tmp_path / "other.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    opened = tracking.open_store(tmp_path / "workspace")
    assert opened.uri == f"sqlite:///{tmp_path}/other.db"
    assert opened.artifacts == str(tmp_path / "mlartifacts")
    assert not (tmp_path / "workspace").exists()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_folder_as_store_is_refused(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match="sqlite:///PATH or the address"):
        tracking.open_store(tmp_path)


def test_server_that_does_not_answer_is_one_sentence_without_the_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match="does not answer") as error:
        tracking.open_store(tmp_path)
    assert "hunter2" not in str(error.value)
    assert "127.0.0.1:9" in str(error.value)


def test_deleted_experiment_says_how_to_restore_it(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    opened = tracking.open_store(Path(store.workspace))
    client(store).delete_experiment(opened.experiment_id)
    with pytest.raises(ValueError, match=f"restore -x {opened.experiment_id}"):
        tracking.open_store(Path(store.workspace))


def test_run_holds_the_resolved_config_as_params_and_yaml(store):
    config = parse({"name": "demo", "ppo": {"kl_coef": 0.125}})
    run_id = tracking.start_run(store, config, {"flow_run": "amber-otter"}, run_name="amber-otter")
    data = client(store).get_run(run_id).data
    assert data.params["ppo.kl_coef"] == "0.125"
    assert data.params["data.sources.stanfordnlp/SHP.min_score_ratio"] == "2.0"
    assert data.params["models.policy_revision"] == "null"
    assert data.tags["flow_run"] == "amber-otter"
    path = client(store).download_artifacts(run_id, "config.yaml")
    assert parse(yaml.safe_load(Path(path).read_text())) == config


def test_secrets_reach_neither_params_nor_artifacts(store):
    config = parse({"data": {"hub": "https://bob:hunter2@mirror/sets"}})
    run_id = tracking.start_run(store, config, {"source": "https://bob:hunter2@host/repo"})
    assert client(store).get_run(run_id).data.params["data.hub"] == "https://mirror/sets"
    written = [path for path in Path(store.workspace).rglob("*") if path.is_file()]
    assert len(written) > 1
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def test_redacted_keeps_numbers_and_hides_text_of_secret_keys():
    tree = {"max_prompt_tokens": 256, "hub": {"token": "hf_abc", "api_key": None}, "list": ["http://u:p@h/x"]}
    expected = {"max_prompt_tokens": 256, "hub": {"token": "***", "api_key": None}, "list": ["http://h/x"]}
    assert tracking.redacted(tree) == expected


def test_flattened_cuts_long_values_and_keeps_empty_ones():
    flat = dict(tracking.flattened({"a": {"b": [1, 2]}, "long": "x" * 1000, "none": None, "empty": {}}))
    assert flat["a.b"] == "[1, 2]"
    assert flat["none"] == "null"
    assert flat["empty"] == "{}"
    assert len(flat["long"]) == 500
    assert flat["long"].endswith("…")


def test_resumed_stage_goes_on_with_its_run_under_the_new_parent(store, parent, tmp_path):
    first = tracking.stage_run(store, parent, "sft", tmp_path)
    tracking.end_run(store, first, "FAILED")
    other = tracking.start_run(store, RunConfig(), {})
    assert tracking.stage_run(store, other, "sft", tmp_path) == first
    again = client(store).get_run(first)
    assert again.info.status == "RUNNING"
    assert again.data.tags["mlflow.parentRunId"] == other
    assert again.data.tags["rlhf.resumed_from"] == parent


def test_stage_of_another_store_or_a_deleted_run_gets_a_new_run(store, parent, tmp_path):
    first = tracking.stage_run(store, parent, "sft", tmp_path)
    file = tmp_path / "records" / "mlflow.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"store": "http://elsewhere"}))
    second = tracking.stage_run(store, parent, "sft", tmp_path)
    assert second != first
    client(store).delete_run(second)
    assert tracking.stage_run(store, parent, "sft", tmp_path) not in (first, second)


def test_finished_stage_has_metrics_identity_inputs_and_datasets(store, parent, tmp_path):
    import pyarrow as pa

    def tables(directory: Path) -> None:
        table = pa.table({"input_ids": [[1, 2], [3]], "source": ["a", "b"]})
        with pa.ipc.new_stream(str(directory / "sft-train.arrow"), table.schema) as stream:
            stream.write_table(table)

    data = made(tmp_path, "tokenise", {}, run_id_of=tables)
    runs = []
    metrics = {"loss": 1.5, "steps": 3, "bad": float("nan"), "perplexity_per_source": {"a/b": 2.0}}
    keep = lambda directory: runs.append(tracking.stage_run(store, parent, "sft", directory))  # noqa: E731
    ref = made(tmp_path, "sft", metrics, {"data": data}, keep)
    file = data.directory / "sft-train.arrow"
    tracking.finish_stage(store, runs[0], ref, [("SFT rows", file, "training"), ("all", data.directory, "evaluation")])

    found = client(store).get_run(runs[0])
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"final/loss": 1.5, "final/steps": 3.0, "final/perplexity_per_source/a/b": 2.0}
    assert found.data.params == {"sft.epochs": "2"}
    assert found.data.tags["rlhf.digest"] == ref.digest
    assert found.data.tags["rlhf.input.data"] == f"tokenise/{data.fingerprint} {data.digest[:16]}"
    rows, whole = sorted(found.inputs.dataset_inputs, key=lambda entry: entry.dataset.name)
    assert (
        rows.dataset.digest
        == json.loads((data.directory / "manifest.json").read_text())["files"]["sft-train.arrow"]["sha256"][:16]
    )
    assert json.loads(rows.dataset.profile)["num_rows"] == 2
    assert [tag.value for tag in rows.tags] == ["training"]
    assert whole.dataset.digest == data.digest[:16]

    import mlflow

    assert mlflow.data.get_source(rows).uri == str(file)
    summary = client(store).get_run(parent).data
    assert summary.metrics == {"sft/loss": 1.5, "sft/steps": 3.0}
    assert summary.tags["stage.sft.run_id"] == runs[0]
    assert summary.tags["stage.sft.cached"] == "false"


def test_cached_stage_is_linked_to_the_run_that_made_it(store, parent, tmp_path):
    runs = []
    keep = lambda directory: runs.append(tracking.stage_run(store, parent, "ppo", directory))  # noqa: E731
    made(tmp_path, "ppo", {"kl": 2.0}, run_id_of=keep)
    cached = made(tmp_path, "ppo", {})
    later = tracking.start_run(store, RunConfig(), {})
    tracking.link_cached(store, later, cached)
    data = client(store).get_run(later).data
    assert data.tags["stage.ppo.run_id"] == runs[0]
    assert data.tags["stage.ppo.cached"] == "true"
    assert data.metrics == {"ppo/kl": 2.0}


def test_tracker_logs_every_step_and_the_machine(store, parent, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracker = tracking.Tracker(store.uri, parent)
    deadline = time.monotonic() + 20
    while "system/cpu_utilization_percentage" not in client(store).get_run(parent).data.metrics:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for step in range(1, 1201):
        tracker.log(step, {"sft/loss": 1 / step, "memory/peak_gib": 2.0})
    tracker.close()
    history = client(store).get_metric_history(parent, "sft/loss")
    assert sorted(point.step for point in history) == list(range(1, 1201))
    metrics = client(store).get_run(parent).data.metrics
    assert metrics["sft/loss"] == 1 / 1200
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100


def test_tracker_takes_the_same_step_twice(store, parent):
    for _ in range(2):
        tracker = tracking.Tracker(store.uri, parent)
        tracker.log(1, {"sft/loss": 1.0})
        tracker.close()
    assert client(store).get_run(parent).data.metrics["sft/loss"] == 1.0


def test_tracker_warns_once_and_never_raises(store, capsys, monkeypatch):
    monkeypatch.setattr("tasks.tracking.tracker.SECONDS_BETWEEN_FLUSHES", 0.05)
    tracker = tracking.Tracker(store.uri, "0" * 32)
    for step in range(20):
        tracker.log(step, {"sft/loss": 1.0})
        time.sleep(0.02)
    tracker.close()
    told = [line for line in capsys.readouterr().err.splitlines() if "MLflow took no metrics" in line]
    assert len(told) == 1
    assert "metrics.jsonl" in told[0]


def test_tracker_sends_later_what_could_not_be_sent(store, parent, monkeypatch):
    attempts = []
    real = tracking.connect

    def sometimes(uri):
        attempts.append(uri)
        if len(attempts) < 3:
            raise ConnectionError("no route")
        return real(uri)

    monkeypatch.setattr("tasks.tracking.tracker.connect", sometimes)
    monkeypatch.setattr("tasks.tracking.tracker.SECONDS_BETWEEN_FLUSHES", 0.05)
    tracker = tracking.Tracker(store.uri, parent)
    tracker.log(1, {"sft/loss": 3.0})
    deadline = time.monotonic() + 20
    while len(attempts) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    tracker.close()
    assert [point.value for point in real(store.uri).get_metric_history(parent, "sft/loss")] == [3.0]


def test_tracker_gives_up_on_a_server_that_hangs(store, parent, monkeypatch, capsys):
    monkeypatch.setattr("tasks.tracking.tracker.SECONDS_TO_CLOSE", 0.2)
    monkeypatch.setattr("tasks.tracking.tracker.connect", lambda uri: time.sleep(5))
    tracker = tracking.Tracker(store.uri, parent)
    tracker.log(1, {"sft/loss": 3.0})
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 3
    assert "MLflow took no metrics" in capsys.readouterr().err


def test_registering_the_same_digest_again_gives_the_same_version(store, parent, tmp_path):
    first = tracking.register_version(store, "twice-policy", tmp_path, parent, {"digest": "a"})
    other = tracking.register_version(store, "twice-policy", tmp_path, parent, {"digest": "b"})
    again = tracking.register_version(store, "twice-policy", tmp_path, parent, {"digest": "a"})
    assert (first, other, again) == (1, 2, 1)
    newest, oldest = tracking.versions(store, "twice-policy")
    assert (newest.version, oldest.version) == (2, 1)
    assert newest.source == tmp_path.as_uri()
    assert newest.run_id == parent


def test_alias_moves_and_only_one_version_has_it(store, parent, tmp_path):
    for digest in "abc":
        tracking.register_version(store, "moves-policy", tmp_path, parent, {"digest": digest})
    assert tracking.alias(store, "moves-policy", "champion") is None
    assert tracking.alias(store, "no-policy", "champion") is None
    tracking.set_alias(store, "moves-policy", "champion", 1)
    tracking.set_alias(store, "moves-policy", "champion", 3)
    assert tracking.alias(store, "moves-policy", "champion").version == 3
    assert [v.version for v in tracking.versions(store, "moves-policy") if "champion" in v.aliases] == [3]
    for _ in range(2):
        tracking.set_alias(store, "moves-policy", "champion", None)
        assert tracking.alias(store, "moves-policy", "champion") is None
    tracking.set_alias(store, "no-policy", "champion", None)


def test_unknown_model_or_version_names_what_exists(store, parent, tmp_path):
    tracking.register_version(store, "known-policy", tmp_path, parent, {"digest": "a"})
    with pytest.raises(ValueError, match=r"no registered model other-policy; registered: .*known-policy"):
        tracking.find_version(store, "other-policy", 1)
    with pytest.raises(ValueError, match="known-policy has no version 9; it has 1"):
        tracking.find_version(store, "known-policy", 9)


def test_addresses_only_where_a_server_shows_them(store):
    assert tracking.run_url(store, "abc") is None
    assert "rlhf ui" in tracking.how_to_open(store)
    server = tracking.Store("http://u:p@host:5000/", "/w", None, "e", "7")
    assert tracking.run_url(server, "abc") == "http://host:5000/#/experiments/7/runs/abc"
    assert tracking.model_url(server, "chat-policy", 3) == "http://host:5000/#/models/chat-policy/versions/3"


def test_sources_are_dataset_inputs_of_the_run(store, parent):
    from mlflow.data import get_source
    from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource

    tracking.log_sources(
        store,
        parent,
        [
            tracking.Source("Dahoas/rm-static", None, "0" * 40, "ab" * 32, {"rows.sft-train": 12, "rows.ppo-eval": 3}),
            tracking.Source("ours", "/data/pairs.jsonl", "local", "cd" * 32, {"rows.sft-train": 1}),
        ],
    )
    inputs = {entry.dataset.name: entry for entry in client(store).get_run(parent).inputs.dataset_inputs}
    hub = inputs["Dahoas/rm-static"]
    tags = {tag.key: tag.value for tag in hub.tags}
    assert hub.dataset.digest == "ab" * 8
    assert tags["mlflow.data.context"] == "training"
    assert (tags["revision"], tags["rows.sft-train"], tags["rows.ppo-eval"]) == ("0" * 40, "12", "3")
    source = get_source(hub)
    assert isinstance(source, HuggingFaceDatasetSource)
    assert (source.path, source.revision) == ("Dahoas/rm-static", "0" * 40)
    assert get_source(inputs["ours"]).uri == "/data/pairs.jsonl"
