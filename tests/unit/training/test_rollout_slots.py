"""The slot engine on a CPU: transformers' greedy answers for every family, whatever the slots; EOS, limits, seeds."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from tasks.config import LoraConfig
from tasks.training.batches import left_padded
from tasks.training.decoder import Joint, UnsupportedError, decoder_of
from tasks.training.lora import add_adapters
from tasks.training.models import Policy
from tasks.training.rollout import generate, truncated
from tasks.training.rollout_slots import Request, Sampling, SlotEngine

EOS, PAD, CPU, TOKENS = 1, 0, torch.device("cpu"), 12
PROMPTS = [[5, 9, 14], [7], [20, 21, 22, 23, 24, 25], *([n, n + 1] for n in range(30, 40))]
IDS = {"vocab_size": 50, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "max_position_embeddings": 64}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = IDS | SHAPE | {"intermediate_size": 64, "initializer_range": 0.2}
OPT = IDS | SHAPE | {"ffn_dim": 64, "init_std": 0.2}
FAMILIES = {
    "opt": OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-350m": OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "llama": LlamaConfig(**WIDE, num_key_value_heads=2),
    "mistral": MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=None),
    "qwen3": Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**WIDE),
    "gpt-neox, one after the other": GPTNeoXConfig(**WIDE, use_parallel_residual=False),
}


def make(config: PreTrainedConfig):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def opt350():
    """A model whose greedy answers have many lengths."""
    return make(FAMILIES["opt-350m"])


def sampled(model, slots=4, prompts=PROMPTS, limits=None, **options):
    rows = left_padded(prompts, PAD, CPU)
    engine = SlotEngine(model, slots, rows.input_ids.shape[1], TOKENS)
    request = Request(rows.input_ids, rows.attention_mask, limits)
    return engine.generate(request, Sampling(TOKENS, **({"eos_id": EOS, "pad_id": PAD} | options)))


def answers(batch):
    made = batch.rollout()
    ids = made.sequences.input_ids[:, -made.answer_mask.shape[1] :]
    return [row[mask].tolist() for row, mask in zip(ids, made.answer_mask, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers_one_by_one(family):
    model = make(FAMILIES[family])
    for prompt, answer in zip(PROMPTS, answers(sampled(model, greedy=True)), strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=PAD)
        assert answer == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("slots", [1, 3, 13, 40])
def test_refilled_slots_give_the_answers_of_the_plain_loop(opt350, slots):
    plain = generate(opt350, left_padded(PROMPTS, PAD, CPU), TOKENS, EOS, PAD)
    assert len(set(plain.answer_mask.sum(1).tolist())) > 3
    found = sampled(opt350, slots, greedy=True).rollout()
    assert torch.equal(found.sequences.input_ids, plain.sequences.input_ids)
    assert torch.equal(found.sequences.position_ids, plain.sequences.position_ids)
    assert torch.equal(found.answer_mask, plain.answer_mask)
    assert torch.equal(found.ended, plain.ended)
    assert_close(found.logprobs, plain.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_training_forward_pass(family):
    model = make(FAMILIES[family])
    made = sampled(model, seed=1, temperature=0.7).rollout()
    start = made.sequences.input_ids.shape[1] - made.answer_mask.shape[1]
    with torch.no_grad():
        again = Policy(model)(made.sequences, start, 0.7).logprobs
    assert_close(made.logprobs[made.answer_mask], again[made.answer_mask], atol=1e-5, rtol=1e-5)
    assert (made.logprobs[~made.answer_mask] == 0).all()


def test_an_answer_is_a_function_of_seed_and_number_in_whatever_slot(opt350):
    first = answers(sampled(opt350, 3, seed=4))
    assert first == answers(sampled(opt350, 13, seed=4))
    assert first != answers(sampled(opt350, 3, seed=5))
    assert first[:2] == answers(sampled(opt350, 2, PROMPTS[:2], seed=4))


def test_first_token_is_sampled_as_often_as_its_probability_says(opt350):
    count = 4000
    made = sampled(opt350, 500, [PROMPTS[0]] * count, torch.ones(count, dtype=torch.int64), temperature=1.5, seed=7)
    with torch.no_grad():
        expected = torch.softmax(opt350(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 1.5, -1)
    found = torch.bincount(made.input_ids[:, -1], minlength=50) / count
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4.5 * spread + 1e-3).all()


def test_each_answer_has_its_own_limit_and_ends_by_eos_only(opt350):
    limits = torch.arange(len(PROMPTS)) % TOKENS + 1
    made = sampled(opt350, 3, limits=limits, seed=2)
    for answer, ended, limit in zip(answers(made), made.ended.tolist(), limits.tolist(), strict=True):
        assert len(answer) <= limit
        assert ended == (answer[-1] == EOS)
        assert ended or len(answer) == limit
        assert EOS not in answer[:-1]
    without = sampled(opt350, 3, limits=limits, seed=2, eos_id=-1)
    assert [len(answer) for answer in answers(without)] == limits.tolist()
    assert not without.ended.any()


def test_several_samples_of_a_prompt_stand_side_by_side(opt350):
    made = sampled(opt350, 4, PROMPTS[:2], n_samples_per_prompt=3, seed=2)
    assert made.batch_size == 6
    assert [
        row[mask].tolist() for row, mask in zip(made.input_ids[:, :3], made.attention_mask[:, :3], strict=True)
    ] == [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    assert len({tuple(answer) for answer in answers(made)[:3]}) > 1


def test_weights_that_change_are_seen_and_never_copied(opt350):
    model = make(FAMILIES["llama"])
    engine = SlotEngine(model, 4, 6, TOKENS)
    joint = engine.decoder.layers[0].qkv
    assert isinstance(joint, Joint)
    assert joint.weight is not None
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert joint.weight.untyped_storage().data_ptr() in own
    rows = left_padded(PROMPTS, PAD, CPU)
    request, sampling = Request(rows.input_ids, rows.attention_mask), Sampling(TOKENS, eos_id=EOS, greedy=True)
    before = answers(engine.generate(request, sampling))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = answers(engine.generate(request, sampling))
    assert after != before
    assert after == answers(sampled(model, greedy=True))
    model.double().float()  # every parameter moves
    assert answers(engine.generate(request, sampling)) == after


@pytest.mark.parametrize("family", ["opt", "llama", "gpt-neox"])
def test_an_adapted_policy_answers_as_transformers_does_and_only_its_adapters_learn(family):
    model = make(FAMILIES[family])
    base = [parameter.clone() for parameter in model.parameters()]
    engine = SlotEngine(model, 4, 6, TOKENS)
    rows = left_padded(PROMPTS, PAD, CPU)
    request, sampling = Request(rows.input_ids, rows.attention_mask), Sampling(TOKENS, eos_id=EOS, greedy=True)
    plain = answers(engine.generate(request, sampling))
    add_adapters(model, LoraConfig(rank=4, alpha=12), "ppo.policy_lora")
    engine = SlotEngine(model, 4, 6, TOKENS)
    assert answers(engine.generate(request, sampling)) == plain  # adapters begin at nothing
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in learnt.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    made = engine.generate(request, sampling)
    found = answers(made)
    assert found != plain
    for prompt, answer in zip(PROMPTS, found, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=PAD)
        assert answer == whole[0, len(prompt) :].tolist()
    rollout = made.rollout()
    start = rollout.sequences.input_ids.shape[1] - rollout.answer_mask.shape[1]
    again = Policy(model)(rollout.sequences, start, 1.0).logprobs[rollout.answer_mask]
    assert_close(rollout.logprobs[rollout.answer_mask], again, atol=1e-5, rtol=1e-5)
    again.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(learnt)
    assert all("lora_" in name for name in learnt)
    kept = [parameter for name, parameter in model.named_parameters() if name not in learnt]
    assert all(torch.equal(before, after) for before, after in zip(base, kept, strict=True))


def test_the_cache_is_given_back_and_made_anew(opt350):
    rows = left_padded(PROMPTS, PAD, CPU)
    engine = SlotEngine(opt350, 4, 6, TOKENS)
    request, sampling = Request(rows.input_ids, rows.attention_mask), Sampling(TOKENS, eos_id=EOS, seed=3)
    first = answers(engine.generate(request, sampling))
    assert engine.cache_bytes == sum(part.nbytes for cache in engine.memory()[1] for part in cache)
    engine.shutdown()
    assert answers(engine.generate(request, sampling)) == first


def test_what_it_cannot_sample_from_is_said():
    window = make(MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=8))
    with pytest.raises(UnsupportedError, match="the last 8 tokens only, fewer than 18"):
        decoder_of(window, 18)
    decoder_of(window, 8)
    window.config.model_type = "another"
    with pytest.raises(UnsupportedError, match="no family another; known: opt, llama"):
        decoder_of(window, 8)


def test_truncation_keeps_the_likeliest():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert truncated(probabilities, 0, 1.0) is probabilities
    assert_close(truncated(probabilities, 2, 1.0), torch.tensor([[0.0, 0.4, 0.0, 0.3]]))
    assert_close(truncated(probabilities, 0, 0.69), torch.tensor([[0.0, 0.4, 0.0, 0.3]]))
    assert_close(truncated(probabilities, 0, 0.71), torch.tensor([[0.0, 0.4, 0.2, 0.3]]))
    assert_close(truncated(probabilities, 3, 0.5), torch.tensor([[0.0, 0.4, 0.0, 0.3]]))
