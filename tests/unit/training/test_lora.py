"""Adapters: the base is untouched and comes back exactly, what is written is a plain merged model."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from tasks.config import LoraConfig
from tasks.training import engine
from tasks.training.ema import Ema
from tasks.training.lora import Base, adapters_off, add_adapters, target_names
from tasks.training.models import Policy, ScalarModel
from tests.tiny import tiny_llama

LORA = LoraConfig(rank=4, alpha=12)
IDS = torch.arange(2, 22).view(2, 10)
SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        pass


def language_models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    opt = OPTConfig(hidden_size=16, ffn_dim=32, word_embed_proj_dim=16, dropout=0.0, **SMALL)
    neox = GPTNeoXConfig(hidden_size=16, intermediate_size=32, **SMALL)
    return {
        "llama": LlamaForCausalLM(tiny_llama(50)),
        "llama, tied": LlamaForCausalLM(tiny_llama(50, tie_word_embeddings=True)),
        "opt": OPTForCausalLM(opt),
        "gpt-neox": GPTNeoXForCausalLM(neox),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0)),
    }


def trained_a_bit(model: PreTrainedModel) -> None:
    """Adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "opt", "gpt-neox", "gpt2"])
def test_the_export_is_a_plain_model_that_answers_as_the_adapted_one(tmp_path: Path, family: str) -> None:
    model = language_models()[family].eval()
    before = model(IDS).logits.detach()
    add_adapters(model, LORA, "sft.lora")
    assert torch.equal(model(IDS).logits, before)  # B is zero
    trained_a_bit(model)
    adapted = model(IDS).logits.detach()
    assert not torch.allclose(adapted, before, atol=1e-2)
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, adapted)
    engine.export(Policy(model), NoTokenizer(), tmp_path / "model")
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_close(plain.eval()(IDS).logits, adapted, atol=1e-5, rtol=1e-5)


def test_only_adapters_and_a_scalar_head_are_trained(tmp_path: Path) -> None:
    model = LlamaForSequenceClassification(tiny_llama(50, num_labels=1, pad_token_id=0)).eval()
    add_adapters(model, LORA, "reward.lora")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained
    assert all("lora_" in name for name in trained - {"score.weight"})
    assert len(trained) == 1 + 2 * 7  # A and B of seven linear layers
    trained_a_bit(model)
    engine.export(ScalarModel(model), NoTokenizer(), tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_reference_without_weights_of_its_own_keeps_the_policy_trainable(llama: LlamaForCausalLM) -> None:
    model = LlamaForCausalLM(llama.config)
    model.load_state_dict(llama.state_dict())
    add_adapters(model, LORA, "ppo.policy_lora")
    trained_a_bit(model)
    policy = Policy(model)

    class Engine:
        module = policy

        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            return self.module.model(ids).logits

    reference = Base(Engine())
    with torch.no_grad():
        assert torch.equal(reference(IDS), llama(IDS).logits)
    Engine()(IDS).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if "lora_" in name}


def test_the_average_is_of_the_trained_parameters_and_is_merged_too(tmp_path: Path) -> None:
    model = LlamaForCausalLM(tiny_llama(50)).eval()
    add_adapters(model, LORA, "ppo.policy_lora")
    policy = Policy(model)
    average = Ema(policy, decay=0.5)
    assert all("lora_" in name for name in average.weights())
    base = model(IDS).logits.detach()
    trained_a_bit(model)
    ups = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_B" in name}
    average.update()
    engine.export(policy, NoTokenizer(), tmp_path / "ema", average.weights())
    with torch.no_grad():
        for name, up in ups.items():
            model.get_parameter(name).copy_(up / 2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ema").eval()
    assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain(IDS).logits, base, atol=1e-3)


@pytest.mark.parametrize(
    ("patterns", "count"), [(None, 7), (["q_proj", "v_proj"], 2), (["self_attn.*"], 4), (["layers.0.mlp.up_proj"], 1)]
)
def test_patterns_are_ends_of_names(patterns: list[str] | None, count: int) -> None:
    names = target_names(LlamaForCausalLM(tiny_llama(50)), patterns, "sft.lora")
    assert len(names) == count
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("q_prj", "did you mean q_proj"),
        ("query_key_value", "it has q_proj, k_proj"),
        ("lm_head", "it has q_proj"),
        ("proj", "no linear layer"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(pattern: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"sft\.lora\.targets: {pattern} matches no linear layer.*") as fault:
        target_names(LlamaForCausalLM(tiny_llama(50)), ["v_proj", pattern], "sft.lora")
    assert hint in str(fault.value)
