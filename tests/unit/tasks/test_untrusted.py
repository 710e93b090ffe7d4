import json
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from data_prep.tokenizer import load_tokenizer
from tasks import base, dag, untrusted
from tasks.config import parse
from tasks.training.models import load_policy, load_scalar
from tests.code import bring_code
from tests.tiny import tiny_llama_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_a_plain_folder_is_taken(folder: Path) -> None:
    untrusted.check(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no weights in safetensors format; save the model again in it"):
        untrusted.check(folder)


class Opened:
    """An object whose unpickling leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


def test_only_weights_that_transformers_reads_from_safetensors_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tokenizer = base.train_tokenizer(iter(["tell me of the red apple", "the pear is green"]), 300)
    LlamaForCausalLM(tiny_llama_for(tokenizer)).save_pretrained(folder)
    marker = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Opened(marker), protocol=2))
    untrusted.check(folder)  # what the hub has in both formats
    AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    with pytest.raises(ValueError, match="holds no weights in safetensors format"):
        untrusted.check(folder)
    with pytest.raises(pickle.UnpicklingError):  # torch's own guard is all that is left
        AutoModelForCausalLM.from_pretrained(folder)
    shards = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(ValueError, match=r"names pytorch_model.bin as weights, no safetensors file in it"):
        untrusted.check(folder)
    with pytest.raises(pickle.UnpicklingError):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("shard", "is_taken"), [("a.safetensors", True), ("../a.safetensors", False), ("/a.safetensors", False)]
)
def test_shards_lie_in_their_folder(folder: Path, shard: str, is_taken: bool) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with nullcontext() if is_taken else pytest.raises(ValueError, match="no safetensors file in it"):
        untrusted.check(folder)


def test_an_adapter_and_weights_that_the_config_names_are_looked_at_too(folder: Path) -> None:
    (folder / "config.json").write_text('{"transformers_weights": "adapter_model.bin"}')
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"names adapter_model.bin as weights"):
        untrusted.check(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        untrusted.check(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}))
    with pytest.raises(
        ValueError, match=f"{name} names code of its own .auto_map., which runs only where a config says so"
    ):
        untrusted.check(folder)


def test_code_that_nobody_needs_does_no_harm(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "mine.Mine"}}))
    untrusted.check(folder)


def own_model(folder: Path, kind: str, tokenizer_too: bool) -> tuple[Path, Path]:
    """A model folder with code of its own, and the file that shows that the code ran."""
    tokenizer = base.train_tokenizer(iter(["tell me of the red apple", "the pear is green"]), 300)
    LlamaForCausalLM(tiny_llama_for(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, bring_code(folder, kind, folder.parent / "ran", tokenizer_too)


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers puts code that it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_code_that_nobody_trusts_does_not_run(tmp_path: Path) -> None:
    folder, marker = own_model(tmp_path / "own", "mine", tokenizer_too=True)
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match="names code of its own"):
        base.use_folder(folder, tmp_path / "base")
    for load in (load_policy, load_tokenizer, lambda path: load_scalar(path, 0, new_head_seed=0)):
        with pytest.raises(ValueError, match=r"trust_remote_code|No tokenizer could be loaded"):
            load(folder)
    known, _ = own_model(tmp_path / "known", "llama", tokenizer_too=False)
    assert base.use_folder(known, tmp_path / "base")["positions"] == 2048
    assert type(load_policy(known).model) is LlamaForCausalLM
    assert not marker.exists()


def test_code_of_a_named_model_runs_and_goes_along_with_what_the_model_becomes(tmp_path: Path) -> None:
    folder, marker = own_model(tmp_path / "own", "llama", tokenizer_too=True)
    (tmp_path / "base").mkdir()
    base.use_folder(folder, tmp_path / "base", trusted=True)
    assert marker.exists()
    tokenizer = load_tokenizer(tmp_path / "base" / "tokenizer", trusted=True)
    policy = load_policy(folder, trusted=True)
    assert (type(tokenizer).__name__, type(policy.model).__name__) == ("MineTokenizer", "MineForCausalLM")
    policy.model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    scalar = load_scalar(tmp_path / "sft", tokenizer.pad_token_id, 0, trusted=True)
    assert type(scalar.model).__name__ == "MineForSequenceClassification"
    assert untrusted.code(tmp_path / "sft") == untrusted.code(folder)
    (folder / "mine.py").write_text("")
    assert untrusted.code(tmp_path / "sft") != untrusted.code(folder)


def test_code_without_a_reward_model_is_one_sentence(tmp_path: Path) -> None:
    folder, _ = own_model(tmp_path / "own", "mine", tokenizer_too=False)
    settings = json.loads((folder / "config.json").read_text())
    del settings["auto_map"]["AutoModelForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_policy(folder, trusted=True).model.config.model_type == "mine"
    with pytest.raises(ValueError, match="has an AutoModelForSequenceClassification of type mine; add it to its code"):
        load_scalar(folder, 0, new_head_seed=0, trusted=True)


def test_code_of_another_repository_is_refused_of_a_named_model_too(tmp_path: Path) -> None:
    folder, _ = own_model(tmp_path / "own", "mine", tokenizer_too=False)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoConfig": "some/where--mine.Mine"}}))
    with pytest.raises(ValueError, match="names code of another repository, which is never run"):
        untrusted.check(folder, trusted=True)


def test_trust_follows_the_named_model_alone(tmp_path: Path) -> None:
    def trusting(**models: object) -> dict[str, list[str]]:
        graph = dag.graph(parse({"workspace": str(tmp_path), "data": {"demo": {}}, "models": models}))
        return {key: node.config["trusted"] for key, node in graph.items() if "trusted" in node.config}

    both = {"policy": "some/policy", "reward": "some/reward"}
    assert trusting(**both) == {}
    rewards = {"reward-base": ["model"], "reward": ["base"], "gold": ["base"]}
    assert trusting(**both, reward_trust_remote_code=True) == rewards | {
        "ppo": ["reward"],
        "evaluate": ["gold", "reward"],
    }
    policies = {"base": ["model"], "tokenise": ["base"], "sft": ["base"]}
    assert trusting(**both, policy_trust_remote_code=True) == policies | {"ppo": ["sft"], "evaluate": ["ppo", "sft"]}
    alone = trusting(policy="some/policy", policy_trust_remote_code=True)
    assert alone["evaluate"] == ["gold", "ppo", "reward", "sft"]
    assert alone["ppo"] == ["reward", "sft"]
