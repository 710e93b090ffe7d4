import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.tables import table_writer
from tasks import tracking
from tasks.config import parse
from tasks.promote import Judgement, promote
from tasks.register import register, register_models, registered_already, registration_stage
from tasks.stages import Stage, finished, read_manifest, run

ROWS = pa.schema([("prompt", pa.string())])
PPO = {"kl": 3.0, "first_reward": 0.0, "reward": 1.0}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking.open_store(tmp_path_factory.mktemp("template"))


@pytest.fixture
def store(template, tmp_path, monkeypatch):
    """A store of the test's own: a copy of the migrated database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fresh_store(template, tmp_path / "workspace")


def fresh_store(template, workspace: Path):
    workspace.mkdir()
    (workspace / "mlflow.db").write_bytes((Path(template.workspace) / "mlflow.db").read_bytes())
    return tracking.open_store(workspace)


def model_folder(directory: Path, architecture: str, weights: str) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_text(weights)


@pytest.fixture
def config(store):
    sources = {"Dahoas/rm-static": {}, "openai/webgpt_comparisons": {}, "mine": {"path": "x.csv", "licence": "CC0-1.0"}}
    return parse({"name": "demo", "workspace": store.workspace, "data": {"sources": sources}})


@pytest.fixture
def refs(store):
    workspace = Path(store.workspace)

    def trained(name, architecture, metrics, inputs):
        def work(directory):
            model_folder(directory / "model", architecture, f"weights of {name}")
            return metrics

        return run(Stage(name, workspace, {}, inputs, ()), work)

    def plain(name, metrics, inputs):
        def work(directory):
            (directory / "answers.jsonl").write_text(json.dumps({"prompt": "Human: why?"}) + "\n")
            return metrics

        return run(Stage(name, workspace, {}, inputs, ()), work)

    def tables(directory):
        for name in ("ppo-eval", "reward-eval"):
            with table_writer(directory / f"{name}.arrow", ROWS) as writer:
                writer.append({"prompt": "why?"})
        return {}

    def download(directory):
        (directory / "out.txt").write_text("rows")
        return {"rows": {"train": 30, "test": 4}, "revision": "abc123"}

    def base(directory):
        (directory / "model").mkdir()
        (directory / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        return {}

    made = {
        f"download:{name}": run(Stage("download", workspace, {"source": name}, {}, ()), download)
        for name in ("Dahoas/rm-static", "openai/webgpt_comparisons", "mine")
    }
    made["tokenise"] = run(
        Stage("tokenise", workspace, {}, {key.split(":")[1]: ref for key, ref in made.items()}, ()), tables
    )
    made["base"] = run(Stage("base", workspace, {"model": "some/model", "revision": None}, {}, ()), base)
    made["sft"] = trained(
        "sft", "LlamaForCausalLM", {"loss": 1.0, "perplexity": 2.7}, {"data": made["tokenise"], "base": made["base"]}
    )
    made["reward"] = trained("reward", "LlamaForSequenceClassification", {"accuracy": 0.9}, {"base": made["sft"]})
    made["ppo"] = trained(
        "ppo",
        "LlamaForCausalLM",
        PPO,
        {"sft": made["sft"], "reward": made["reward"]},
    )
    made["evaluate"] = plain("evaluate", {"win_rate": 0.75, "ppo_reward": 1.25}, {"ppo": made["ppo"]})
    return made


@pytest.fixture
def averaged(store, refs):
    """The same run with a moving average beside the policy."""

    def work(directory):
        model_folder(directory / "model", "LlamaForCausalLM", "weights of ppo")
        model_folder(directory / "ema", "LlamaForCausalLM", "average of ppo")
        return PPO

    def plain(directory):
        (directory / "answers.jsonl").write_text(json.dumps({"prompt": "Human: why?"}) + "\n")
        return {"win_rate": 0.75, "ppo_reward": 1.25, "ema_win_rate": 0.5}

    workspace = Path(store.workspace)
    ppo = run(Stage("ppo", workspace, {"ema": 1}, {"sft": refs["sft"], "reward": refs["reward"]}, ()), work)
    return refs | {"ppo": ppo, "evaluate": run(Stage("evaluate", workspace, {}, {"ppo": ppo}, ()), plain)}


@pytest.fixture
def run_id(store, config):
    return tracking.start_run(store, config, {})


def test_both_models_are_registered_as_candidates_with_their_inputs(store, config, refs, run_id):
    made = register(store, config, refs, run_id)
    assert (made.policy, made.policy_version, made.reward, made.reward_version) == ("demo-policy", 1, "demo-reward", 1)
    assert not made.cached
    policy = tracking.alias(store, "demo-policy", "candidate")
    assert policy.digest == refs["ppo"].digest
    assert policy.run_id == run_id
    assert policy.tags["input.data.digest"] == refs["tokenise"].digest
    assert policy.tags["input.reward"] == refs["reward"].fingerprint
    assert policy.tags["metric.win_rate"] == "0.75"
    reward = tracking.alias(store, "demo-reward", "candidate")
    assert reward.digest == refs["reward"].digest
    assert reward.tags["metric.accuracy"] == "0.9"
    assert "input.reward.digest" not in reward.tags
    assert tracking.alias(store, "demo-policy", "champion") is None


def test_the_moving_average_is_registered_and_follows_its_policy(store, config, averaged, run_id):
    made = register(store, config, averaged, run_id)
    assert made.versions == {"demo-policy": 1, "demo-reward": 1, "demo-ema": 1}
    weights = Path(made.directory) / "ema" / "model" / "model.safetensors"
    assert os.path.samefile(weights, averaged["ppo"].directory / "ema" / "model.safetensors")
    tags = {name: tracking.find_version(store, name, 1).tags for name in made.versions}
    assert {key for key in tags["demo-ema"] if key.startswith("metric.")} == {"metric.ema_win_rate"}
    assert {key for key in tags["demo-policy"] if key.startswith("metric.")} == {"metric.win_rate", "metric.ppo_reward"}
    assert promote(store, "demo-policy", 1, Judgement([], None)).promoted
    for name in made.versions:
        assert tracking.alias(store, name, "champion").version == 1
    assert register(store, config, averaged, run_id).cached


def test_registered_folder_shares_the_weights_and_leaves_the_stage_whole(store, config, refs, run_id):
    made = register(store, config, refs, run_id)
    policy = Path(made.directory) / "policy"
    assert tracking.alias(store, "demo-policy", "candidate").source == policy.as_uri()
    original = refs["ppo"].directory / "model" / "model.safetensors"
    assert os.path.samefile(original, policy / "model" / "model.safetensors")
    assert not (original.parent / "MLmodel").exists()
    assert "TextGenerationPipeline" in (policy / "MLmodel").read_text()
    assert "LlamaForSequenceClassification" in (policy.parent / "reward" / "MLmodel").read_text()
    assert sorted(file.name for file in (policy / "components" / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert finished(registration_stage(config, refs)) is not None
    card = (policy / "README.md").read_text()
    assert refs["reward"].fingerprint in card
    assert "| win rate | 0.75 |" in card
    assert "| win rate vs champion | >= 0.52 (lower bound >= 0.5) |" in card
    assert "| Dahoas/rm-static | abc123 | 34 |  | MIT, that of Anthropic/hh-rlhf" in card
    assert "| openai/webgpt_comparisons | abc123 | 34 |  | unknown |" in card
    assert "| mine | abc123 | 34 |  | CC0-1.0 |" in card
    assert "Base model: some/model@local; licence: apache-2.0." in card
    assert "Gates" in card
    example = json.loads((policy / "input_example.json").read_text())
    assert example == ["Human: why?"]
    assert "saved_input_example_info" in (policy / "MLmodel").read_text()


def test_figures_are_linked_to_the_rows_that_they_were_measured_on(store, config, refs, run_id):
    register(store, config, refs, run_id)
    client = tracking.connect(store.uri)
    models = {model.name: model for model in client.search_logged_models([store.experiment_id])}
    assert set(models) == {"demo-policy", "demo-reward"}
    for name, table, figure, value in (
        ("demo-policy", "ppo-eval", "win_rate", 0.75),
        ("demo-reward", "reward-eval", "accuracy", 0.9),
    ):
        found = {metric.key: metric for metric in models[name].metrics}[figure]
        digest = read_manifest(refs["tokenise"].directory)["files"][f"{table}.arrow"]["sha256"][:16]
        assert (found.value, found.dataset_name, found.dataset_digest) == (value, table, digest)
        assert tracking.find_version(store, name, 1).tags["logged_model"] == models[name].model_id
    register(store, config, refs, run_id)
    assert len(client.search_logged_models([store.experiment_id])) == 2


def test_second_time_is_cached_and_the_task_says_so(store, config, refs, run_id):
    first = register(store, config, refs, run_id)
    assert registered_already(store, config, refs)
    state = register_models.fn(store, config, refs, run_id)
    assert (state.name, state.type.value) == ("Cached", "COMPLETED")
    assert register(store, config, refs, run_id).policy_version == first.policy_version
    assert len(tracking.versions(store, "demo-policy")) == 1


def test_another_store_is_not_taken_for_this_one(template, tmp_path, store, config, refs, run_id):
    register(store, config, refs, run_id)
    other = fresh_store(template, tmp_path / "other")
    assert not registered_already(other, config, refs)
    made = register(other, config, refs, tracking.start_run(other, config, {}))
    assert not made.cached
    assert tracking.alias(other, "demo-policy", "candidate").version == 1


def test_damaged_registered_files_are_made_again_under_the_same_version(store, config, refs, run_id):
    first = register(store, config, refs, run_id)
    (Path(first.directory) / "policy" / "MLmodel").unlink()
    assert not registered_already(store, config, refs)
    again = register(store, config, refs, run_id)
    assert not again.cached
    assert (again.policy_version, again.directory) == (1, first.directory)
    assert (Path(again.directory) / "policy" / "MLmodel").is_file()


def test_candidate_moves_to_what_the_last_run_made(store, config, refs, run_id):
    register(store, config, refs, run_id)

    def work(directory):
        model_folder(directory / "model", "LlamaForCausalLM", "other weights")
        return PPO

    other = run(Stage("ppo", Path(store.workspace), {"kl_coef": 1}, {"sft": refs["sft"]}, ()), work)
    register(store, config, refs | {"ppo": other}, run_id)
    assert tracking.alias(store, "demo-policy", "candidate").version == 2
    register(store, config, refs, run_id)
    assert tracking.alias(store, "demo-policy", "candidate").version == 1
    assert len(tracking.versions(store, "demo-reward")) == 1


def test_a_candidate_without_an_average_leaves_no_other_as_its_own(store, config, averaged, refs, run_id):
    register(store, config, averaged, run_id)
    assert register(store, config, refs, run_id).versions == {"demo-policy": 2, "demo-reward": 1}
    assert tracking.alias(store, "demo-ema", "candidate") is None
    register(store, config, averaged, run_id)
    for name in ("demo-policy", "demo-reward", "demo-ema"):
        assert tracking.alias(store, name, "candidate").version == 1
