"""The head of a reward model, new where its folder has none; its first layers, which may stay as they are, and its last
ones, which may be left out."""

from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from tasks.config import ConfigError, parse
from tasks.training.models import ScalarModel, decoder_layers, freeze_first, keep_first, load_scalar
from tests.tiny import tiny_llama

IDS = torch.arange(2, 22).view(2, 10)


def test_new_head_is_drawn_by_seed_and_a_trained_one_is_kept(tmp_path: Path) -> None:
    config = tiny_llama(50, num_labels=1, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "policy")
    drawn = [load_scalar(tmp_path / "policy", 0, new_head_seed=seed).model.score.weight for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    trained = LlamaForSequenceClassification(config)
    trained.save_pretrained(tmp_path / "reward")
    kept = load_scalar(tmp_path / "reward", 0, new_head_seed=1).model.score.weight
    assert torch.equal(kept, trained.score.weight.float())


FAMILIES = ["llama", "opt-350m", "qwen2", "gpt-neox", "gpt2"]


def classifiers(layers: int = 3) -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    whole = {"num_labels": 1, "pad_token_id": 0}
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, **whole}
    opt = OPTConfig(ffn_dim=32, word_embed_proj_dim=8, dropout=0.0, do_layer_norm_before=False, **shape)
    neox = GPTNeoXConfig(intermediate_size=32, classifier_dropout=0.0, **shape)
    gpt2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=layers, n_head=2, resid_pdrop=0, embd_pdrop=0, **whole)
    return {
        "llama": LlamaForSequenceClassification(tiny_llama(50, num_hidden_layers=layers, **whole)),
        "opt-350m": OPTForSequenceClassification(opt),
        "qwen2": Qwen2ForSequenceClassification(Qwen2Config(intermediate_size=32, num_key_value_heads=2, **shape)),
        "gpt-neox": GPTNeoXForSequenceClassification(neox),
        "gpt2": GPT2ForSequenceClassification(gpt2),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_above_the_frozen_layers_are_those_of_the_whole_model(family: str) -> None:
    model = classifiers()[family].eval()
    model(IDS).logits.square().sum().backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    freeze_first(ScalarModel(model), 2, "reward.frozen_layers")
    read = []
    decoder_layers(ScalarModel(model))[2].register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
    model(IDS).logits.square().sum().backward()
    assert not read[0].requires_grad  # the backward pass ends here
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(torch.equal(own[name], whole[name]) for name in own)
    below = ("layers.0.", "layers.1.", ".h.0.", ".h.1.", "embed_", "project_in", ".wte.", ".wpe.")
    assert own.keys() == {name for name, grad in whole.items() if not any(part in name for part in below)}
    assert {"score.weight"} < own.keys()


def test_none_are_frozen_by_0_and_no_more_than_there_are() -> None:
    model = ScalarModel(classifiers()["llama"])
    freeze_first(model, 0, "reward.frozen_layers")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"reward\.frozen_layers is 4, but this model has 3 layers; lower it"):
        freeze_first(model, 4, "reward.frozen_layers")
    freeze_first(model, 3, "reward.frozen_layers")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["model.model.norm.weight", "model.score.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_its_first_layers_is_one_that_never_had_more(family: str, tmp_path: Path) -> None:
    model, never = classifiers()[family].eval(), classifiers(layers=2)[family].eval()
    weights = model.state_dict()
    never.load_state_dict({name: weights[name] for name in never.state_dict()})
    cut = ScalarModel(model)
    whole = cut.model(IDS).logits
    keep_first(cut, 2, "reward.layers")
    expected = never(IDS).logits
    assert not torch.equal(whole, expected)
    assert torch.equal(cut.model(IDS).logits, expected)
    assert cut.state_dict().keys() == ScalarModel(never).state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = load_scalar(tmp_path, 0).eval()
    assert len(decoder_layers(loaded)) == 2
    torch.testing.assert_close(loaded.model(IDS).logits, expected)


def test_all_layers_are_kept_by_none_and_no_more_than_there_are() -> None:
    model = ScalarModel(classifiers()["llama"])
    keep_first(model, None, "reward.layers")
    assert len(decoder_layers(model)) == 3
    with pytest.raises(ValueError, match=r"gold\.layers is 4, but this model has 3 layers; lower it"):
        keep_first(model, 4, "gold.layers")
    model.model._no_split_modules = None
    with pytest.raises(ValueError, match=r"does not say what its layers are; remove it"):
        keep_first(model, 1, "reward.layers")
    with pytest.raises(ConfigError, match="frozen_layers is 3, but layers leaves 2; lower it"):
        parse({"reward": {"layers": 2, "frozen_layers": 3}})


def test_frozen_layers_and_adapters_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="with lora every layer is frozen already") as error:
        parse({"reward": {"frozen_layers": 1, "lora": {"rank": 4}}})
    assert str(error.value).count("frozen already") == 1  # not once more for gold, which takes over both
    with pytest.raises(ConfigError, match=r"^gold: .* \(gold takes from reward what it does not set itself\)"):
        parse({"reward": {"frozen_layers": 1}, "gold": {"lora": {"rank": 4}}})
