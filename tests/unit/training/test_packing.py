"""Packed rows against one sample at a time, for every model family; chunked log-probabilities against log_softmax."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
)

from tasks.training import attention, packing
from tasks.training import logprobs as logprobs_module
from tasks.training.attention import FAMILIES, use_packed
from tasks.training.attention_cudnn import dense_attention
from tasks.training.batches import language_batch, left_padded, pair_batch
from tasks.training.decoder import UnsupportedError, decoder_of
from tasks.training.logprobs import scores_from_hidden, token_entropy, token_logprobs
from tasks.training.models import Policy, ScalarModel
from tasks.training.packing import best_fit, in_few_shapes, own_rows, packed

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
}
GQA = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 4},
    "qwen2": GQA,
    "qwen2-window": {**GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": GQA,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "opt-350m": {"ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0, "do_layer_norm_before": False},
    "gpt_neox": {"intermediate_size": 64, "rotary_pct": 0.5},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
ROWS = [
    {"prompt": [3, 4, 5], "answer": [6, 7, 8, 9, 10, 1]},
    {"prompt": [11], "answer": [12]},
    {"prompt": [13, 14, 15, 16, 17, 18, 19, 20], "answer": [21, 22, 1]},
    {"prompt": [23, 24], "answer": [25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 1]},
]


def config_of(kind: str):
    family = kind.removesuffix("-window").removesuffix("-350m")
    return AutoConfig.for_model(family, **SHAPE, **KINDS[kind])


@pytest.fixture(params=KINDS)
def policy(request) -> Policy:
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(config_of(request.param)))


def stock_answer_logprobs(model, row: dict) -> Tensor:
    """By transformers' eager attention and log_softmax, one sample."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([row["prompt"] + row["answer"]])
    logits = model(ids).logits[0, len(row["prompt"]) - 1 : -1]
    use_packed(model)
    return logits.log_softmax(-1).gather(1, torch.tensor(row["answer"]).unsqueeze(1))[:, 0]


def test_every_family_that_is_let_in_is_tested_here():
    assert {config_of(kind).model_type for kind in KINDS} == set(FAMILIES)


def test_packed_gives_the_logprobs_and_gradients_of_one_sample_at_a_time(policy):
    alone = torch.cat([stock_answer_logprobs(policy.model, row) for row in ROWS])
    gradients = torch.autograd.grad(-alone.sum() / len(alone), policy.parameters(), allow_unused=True)
    batch = language_batch(ROWS, CPU)
    packed = policy(batch.row, batch.learnt).logprobs
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    (-packed.sum() / len(packed)).backward()
    for (name, parameter), expected in zip(policy.named_parameters(), gradients, strict=True):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(parameter) if expected is None else expected
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_learnt_tokens_are_the_answers_but_for_others_turns_and_never_the_first_of_a_sample():
    conversation = {"prompt": [], "answer": [3, 4, 5, 6, 7, 8, 1], "others": [{"begin": 3, "end": 5}]}
    batch = language_batch([ROWS[1], conversation], CPU)
    assert batch.learnt.tolist() == [1, 3, 4, 7, 8]
    assert batch.row.input_ids[0, batch.learnt].tolist() == [12, 4, 5, 8, 1]


def test_prompts_are_learnt_where_they_shall_be():
    batch = language_batch(ROWS[:2], CPU, prompt_loss=True)
    assert batch.learnt.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert batch.row.input_ids[0, batch.learnt].tolist() == [4, 5, 6, 7, 8, 9, 10, 1, 12]


def test_packed_gives_the_same_with_gradient_checkpointing(policy):
    batch = language_batch(ROWS, CPU)
    policy.train()
    policy(batch.row, batch.learnt).logprobs.sum().backward()
    plain = [p.grad for p in policy.parameters()]
    policy.zero_grad()
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy(batch.row, batch.learnt).logprobs.sum().backward()
    for parameter, expected in zip(policy.parameters(), plain, strict=True):
        assert (parameter.grad is None and expected is None) or torch.equal(parameter.grad, expected)


def test_the_operator_around_cudnns_attention_is_causal_attention_in_each_part_of_a_row():
    """cuDNN's kernels replaced by the same in plain torch: the layouts, the gradients, and what compilation is told."""

    def shares(query: Tensor, key: Tensor, scale: float) -> Tensor:
        later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
        return (query @ key.mT * scale).masked_fill(later, -torch.inf).softmax(-1)

    def forward(query, key, value, bias, keeps_sums, dropout, causal, debug=False, *, scale):
        assert (bias, keeps_sums, dropout, causal, debug) == (None, True, 0.0, True, False)
        none, number = torch.empty(0), torch.zeros((), dtype=torch.int64)
        output = shares(query, key, scale) @ value
        sums = output.new_zeros(*query.shape[:3], 1, dtype=torch.float32)
        return output, sums, none, none, query.shape[2], key.shape[2], number, number.clone(), none

    def backward(gradient, query, key, value, output, sums, seed, offset, *others, scale):
        assert others == (None, None, None, query.shape[2], key.shape[2], 0.0, True)
        seen = shares(query, key, scale)
        inner = gradient @ value.mT - (gradient * output).sum(-1, keepdim=True)
        scores = seen * inner * scale
        return scores @ key, scores.mT @ query, seen.mT @ gradient

    draw = torch.Generator().manual_seed(0)
    row = [torch.randn(12, 2, 8, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(3)]
    batch = [heads.unflatten(0, (3, 4)).transpose(1, 2) for heads in row]
    exact = torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=True, scale=0.3).transpose(1, 2)
    exact = exact.flatten(0, 1)
    expected = torch.autograd.grad(exact.sin().sum(), row)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")
        found = dense_attention(*row, 3, 0.3)
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), row), expected)
        torch.library.opcheck(torch.ops.rlhf.dense_attention.default, (*row, 3, 0.3))


@torch.no_grad()
def test_rows_in_few_shapes_give_the_same(policy, monkeypatch):
    monkeypatch.setattr(in_few_shapes, "__defaults__", (64, 8))
    batch = language_batch(ROWS, CPU)
    row = in_few_shapes(batch.row)
    assert (row.input_ids.shape[1], len(row.cu_seqlens) - 1, row.max_seqlen) == (64, 8, 16)
    assert row.cu_seqlens.tolist()[4:] == [36, 50, 64, 64, 64]
    plain = policy(batch.row, batch.learnt).logprobs
    policy.compiled = True
    torch.testing.assert_close(policy(batch.row, batch.learnt).logprobs, plain)


@torch.no_grad()
def test_no_token_sees_another_sample(policy):
    batch = language_batch(ROWS, CPU)
    before = policy(batch.row, batch.learnt).logprobs.split([len(row["answer"]) for row in ROWS])
    for changed in range(len(ROWS)):
        other = {key: [token + 7 for token in ROWS[changed][key]] for key in ("prompt", "answer")}
        rows = [other if index == changed else row for index, row in enumerate(ROWS)]
        batch = language_batch(rows, CPU)
        after = policy(batch.row, batch.learnt).logprobs.split([len(row["answer"]) for row in rows])
        assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [
            index != changed for index in range(len(ROWS))
        ]


@torch.no_grad()
def test_padded_batches_keep_their_masks(policy):
    """The same model reads padded batches, as PPO gives them: a sample's numbers do not depend on its padding."""
    rows = [row["prompt"] + row["answer"] for row in ROWS]
    together = policy(left_padded(rows, 0, CPU), 1).logprobs
    for row, got in zip(rows, together, strict=True):
        alone = policy(left_padded([row], 0, CPU), 1).logprobs[0]
        torch.testing.assert_close(got[-len(alone) :], alone, atol=1e-5, rtol=1e-5)


def test_cudnn_is_not_asked_where_sums_are_to_come_in_one_order(monkeypatch):
    monkeypatch.setattr(attention, "is_fast", lambda device: True)
    row = packed([[5] * 128, [6] * 128], CPU)
    assert attention.inside(row)["by_cudnn"]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not attention.inside(row)["by_cudnn"]


def test_scores_of_packed_pairs_are_those_of_the_answers_alone():
    torch.manual_seed(1)
    config = config_of("opt-350m")
    config.num_labels = 1
    model = ScalarModel(AutoModelForSequenceClassification.from_config(config))
    pairs = [
        {"prompt": [3, 4], "chosen": [5, 6, 7], "rejected": [8], "weight": 1.0},
        {"prompt": [9], "chosen": [10], "rejected": [11, 12, 13, 14], "weight": 0.5},
    ]
    batch = pair_batch(pairs, CPU)
    packed = model(batch.row)[0, batch.last]
    texts = [pair["prompt"] + pair[side] for side in ("chosen", "rejected") for pair in pairs]
    alone = torch.cat([model.model(torch.tensor([text])).logits[0] for text in texts])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


class Own(LlamaForCausalLM):
    """As a model folder's code may define it."""


class Leaky(LlamaForCausalLM):
    """Does not hand on where the samples of a row end."""

    def __init__(self, config) -> None:
        super().__init__(config)
        whole = self.model.forward
        self.model.forward = lambda cu_seqlens=None, **inputs: whole(**inputs)


class Narrow(LlamaForCausalLM):
    """Takes no keyword arguments beyond those that it knows."""

    def __init__(self, config) -> None:
        super().__init__(config)
        whole = self.model.forward
        self.model.forward = lambda input_ids, attention_mask, position_ids, use_cache: whole(input_ids)


def test_a_class_that_a_model_brings_is_asked_whether_it_keeps_samples_apart():
    config = config_of("llama")
    config.model_type = "mine"
    Policy(Own(config).eval())
    for made in (Leaky, Narrow):
        with pytest.raises(ValueError, match=f"in {made.__name__}, the code that the model brings, a token"):
            Policy(made(config_of("llama")).eval())
    with pytest.raises(UnsupportedError, match="which alone knows its forward"):
        decoder_of(Own(config_of("llama")), 8)


def test_other_model_types_are_refused_by_name():
    bert = BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match=r"type bert .* take one of llama, mistral"):
        use_packed(bert)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 20))
def test_best_fit_packs_every_sample_once_within_the_budget_and_the_bound(sizes, budget):
    rows = best_fit(sizes, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in row) <= budget or len(row) == 1 for row in rows)
    if max(sizes) <= budget:
        assert len(rows) <= 11 / 9 * _fewest_rows(sizes, budget) + 1


def _fewest_rows(sizes: list[int], budget: int) -> int:
    """Fewer are impossible: the tokens, and samples of more than half a row, need as many."""
    return max(math.ceil(sum(sizes) / budget), sum(2 * size > budget for size in sizes))


def test_best_fit_takes_the_fullest_row_that_fits():
    assert best_fit([4, 9, 5, 1, 6, 2], 10) == [[1, 3], [4, 0], [2, 5]]


@pytest.mark.parametrize(
    ("sizes", "budget", "ranks", "unused"),
    [([600] * 9, 1000, 2, 1), ([600], 1000, 2, 1), ([500] * 13, 900, 8, 3), ([500] * 13, 1000, 8, 0), ([], 1000, 2, 0)],
)
def test_every_rank_has_as_many_rows_whatever_the_number_of_samples(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], budget: int, ranks: int, unused: int
) -> None:
    monkeypatch.setattr(packing, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(packing, "rank", lambda rank=rank: rank)
        shares.append(own_rows(sizes, budget))
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for row in share]
    assert sorted(sample for row in rows for sample in row) == list(range(len(sizes)))
    assert rows.count([]) == unused


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 3 * 11)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_logprobs_and_their_gradients_are_those_of_log_softmax(with_bias):
    torch.manual_seed(2)
    hidden = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    tokens, above = torch.randint(11, (2, 4)), torch.randn(2, 4, dtype=torch.float64)
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = token_logprobs(logits, tokens, 0.7)
    got = scores_from_hidden(hidden, weight, bias, tokens, 0.7, with_entropy=True)
    torch.testing.assert_close(got.logprobs, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.entropy, token_entropy(logits, 0.7), atol=1e-12, rtol=0)
    assert not got.entropy.requires_grad
    for mine, theirs in zip(
        torch.autograd.grad(got.logprobs, inputs, above), torch.autograd.grad(expected, inputs, above), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)
    assert torch.autograd.gradcheck(lambda *x: scores_from_hidden(x[0], x[1], bias, tokens).logprobs, inputs[:2])


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_made(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 10 * 40)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight = torch.randn(100, 4, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    with Sizes():
        scores_from_hidden(hidden, weight, None, torch.randint(40, (100,)), with_entropy=True).logprobs.sum().backward()
    assert largest <= 10 * 40


def test_bf16_head_sums_its_gradient_over_chunks_in_fp32(monkeypatch):
    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 64)
    torch.manual_seed(3)
    hidden, weight = torch.randn(512, 8).bfloat16(), (torch.randn(32, 8) / 4).bfloat16()
    tokens = torch.randint(32, (512,))

    def gradient(dtype) -> Tensor:
        own = weight.to(dtype).requires_grad_()
        (result,) = torch.autograd.grad(scores_from_hidden(hidden.to(dtype), own, None, tokens).logprobs.sum(), own)
        return result.double()

    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16) - exact).norm() / exact.norm() < 4e-3
