from pathlib import Path

import pytest

from tasks import dag, registered, tracking
from tasks.config import ConfigError, RunConfig, parse


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A workspace with chat-policy 1 and 2, of which 1 is champion, and a reward model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("workspace")
        store = tracking.open_store(folder)
        for name in ("chat-policy 1", "chat-policy 2", "chat-reward 1"):
            made = folder / "register" / name
            (made / "model").mkdir(parents=True)
            for file in ("config.json", "tokenizer.json", "model.safetensors"):
                (made / "model" / file).write_text("{}")
            tracking.register_version(store, name.partition(" ")[0], made, None, {"digest": name})
        tracking.set_alias(store, "chat-policy", "champion", 1)
        return folder


def config(workspace: Path, **models: str) -> RunConfig:
    return parse({"workspace": str(workspace), "data": {"demo": {}}, "models": models})


def test_alias_becomes_the_folder_of_the_version_that_it_names_now(workspace):
    pinned = registered.pinned(config(workspace, policy="models:/chat-policy@champion", reward="models:/chat-reward/1"))
    assert pinned.models.policy == str(workspace / "register" / "chat-policy 1" / "model")
    assert pinned.models.policy_revision == "models:/chat-policy/1"
    assert pinned.models.reward == str(workspace / "register" / "chat-reward 1" / "model")
    assert pinned.models.reward_revision == "models:/chat-reward/1"
    assert registered.pinned(pinned) == pinned


def test_base_of_a_warm_start_keeps_the_version_and_follows_the_alias(workspace):
    asked = config(workspace, policy="models:/chat-policy@champion")
    first = dag.graph(registered.pinned(asked))["base"].config
    assert first["revision"] == "models:/chat-policy/1"
    assert "model.safetensors" in first["files"]
    other = config(workspace, policy="models:/chat-policy/2")
    assert dag.graph(registered.pinned(other))["base"].config != first
    assert dag.graph(other)["base"].config["model"] == "models:/chat-policy/2"  # before a run begins, nothing is read


def test_config_without_registered_models_is_left_alone(workspace, monkeypatch):
    monkeypatch.setattr(tracking, "open_store", None)  # must not come to be called
    plain = config(workspace, policy="HuggingFaceTB/SmolLM2-135M")
    assert registered.pinned(plain) is plain


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("models:/chat-policy@best", "models.policy: chat-policy has no alias best; it has champion"),
        ("models:/chat-policy/9", "models.policy: chat-policy has no version 9; it has 1, 2"),
        ("models:/talk-policy@champion", "models.policy: There is no registered model talk-policy"),
    ],
)
def test_what_is_not_registered_is_one_sentence(workspace, name, sentence):
    with pytest.raises(ConfigError) as raised:
        registered.pinned(config(workspace, policy=name))
    assert sentence in str(raised.value)


@pytest.mark.parametrize("tag", ["../../evil", "{outside}", "0123456789abcde/", "0123456789ABCDEF", "0" * 17])
def test_a_fingerprint_that_leads_out_of_the_workspace_is_refused(workspace, tmp_path, tag):
    for outside in (tmp_path / "outside", workspace.parent / "evil"):  # the tags lead to a model
        (outside / "model").mkdir(parents=True, exist_ok=True)
        (outside / "model" / "config.json").write_text("{}")
    tags = {"digest": "d", "fingerprint": tag.format(outside=tmp_path / "outside")}
    version = tracking.Version("chat-policy", 3, (), tags, "runs:/gone/policy", None, 0.0)
    with pytest.raises(ValueError, match="names no stage: the record that names it was damaged or forged"):
        registered.as_stage(tracking.open_store(workspace), version, workspace)


def test_a_fingerprint_is_looked_for_in_the_workspace(workspace):
    made = workspace / "ppo" / "0123456789abcdef"
    (made / "model").mkdir(parents=True)
    (made / "model" / "config.json").write_text("{}")
    tags = {"digest": "d", "fingerprint": made.name}
    version = tracking.Version("chat-policy", 3, (), tags, "runs:/gone/policy", None, 0.0)
    assert registered.as_stage(tracking.open_store(workspace), version, workspace).directory == made
