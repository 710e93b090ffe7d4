"""The slot engine on a GPU: kernels against plain torch, graphs against single steps, also after DeepSpeed's steps."""

import os

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tasks.config import EngineConfig, OptimizerConfig
from tasks.training import decode
from tasks.training.batches import left_padded
from tasks.training.engine import start, train_engine
from tasks.training.models import Policy
from tasks.training.rollout import generate
from tasks.training.rollout_slots import Request, Sampling, SlotEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EOS, PAD, TOKENS = 1, 0, 24
PROMPTS = [[5, 9, 14], [7], [20, 21, 22, 23, 24, 25], *([n, n + 1] for n in range(30, 59))]
IDS = {"vocab_size": 500, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "max_position_embeddings": 64}
SHAPE = IDS | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SHAPE | {"intermediate_size": 256, "initializer_range": 0.1}
FAMILIES = {
    "opt": OPTConfig(**SHAPE, ffn_dim=256, init_std=0.1, word_embed_proj_dim=128, dropout=0.0),
    "llama": LlamaConfig(**WIDE, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**WIDE),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def device():
    ports = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29581}
    os.environ.update({name: str(value) for name, value in ports.items()})
    return start("cuda")


def model_of(family: str, device: torch.device):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval().to(device)


def request(device: torch.device) -> Request:
    rows = left_padded(PROMPTS, PAD, device)
    return Request(rows.input_ids, rows.attention_mask)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "size", "turning"), [(32, 32, 64, 0), (8, 2, 80, 20), (9, 3, 64, 64)])
def test_attention_is_that_of_plain_torch(dtype, heads, key_heads, size, turning):
    torch.manual_seed(0)
    shape = (6, key_heads, 300, size)
    mine = decode.Cache(*(torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2)))
    plain = decode.Cache(*(part.cpu().float() for part in mine))
    states = [[3, 0, 5, 1, 2], [70, 299, 5, 0, 9, 130], [True, True, False, True, True, True]]
    slots = decode.Slots(*map(torch.tensor, states))
    joint = torch.randn(5, (heads + 2 * key_heads) * size, dtype=dtype, device="cuda")
    parts = [p.unflatten(-1, (-1, size)) for p in joint.split([heads * size, key_heads * size, key_heads * size], -1)]
    angles = None
    if turning:
        turn = torch.randn(300, turning // 2).repeat(1, 2)
        angles = tuple(part.to(dtype) for part in (turn.cos(), turn.sin()))
    on_gpu = angles and tuple(part.cuda() for part in angles)
    found = decode.attend(*parts, mine, decode.Slots(*(part.cuda() for part in slots)), on_gpu, size**-0.5)
    exact = angles and tuple(part.float() for part in angles)
    expected = decode.attend(*(part.cpu().float() for part in parts), plain, slots, exact, size**-0.5)
    active = slots.active[slots.rows]
    error = TOLERANCE[dtype]
    assert_close(found.cpu().float()[active], expected[active], atol=error, rtol=error)
    for one, other in zip(mine, plain, strict=True):
        assert_close(one.cpu().float(), other, atol=error, rtol=error)


@pytest.mark.parametrize("norm_class", [nn.LayerNorm, LlamaRMSNorm])
def test_norms_of_sums_are_those_of_plain_torch(norm_class):
    torch.manual_seed(0)
    norm = norm_class(200).cuda()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    stream, addend = torch.randn(2, 7, 200, device="cuda")
    total, normed = decode.add_norm(stream, addend, norm)
    assert_close(total, stream + addend)
    assert_close(normed, norm(stream + addend), atol=1e-5, rtol=1e-5)


def test_tokens_are_sampled_as_often_as_their_probability_says():
    rows = 200_000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, -6.0]], device="cuda")
    numbers, zeros = torch.arange(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    seed = torch.tensor([12345], device="cuda")
    tokens, logprobs = decode.choose(logits.expand(rows, -1), 0.7, False, seed, numbers, zeros)
    expected = torch.log_softmax(logits[0] / 0.7, -1)
    assert_close(logprobs, expected[tokens], atol=1e-5, rtol=1e-5)
    spread = (expected.exp() * (1 - expected.exp()) / rows).sqrt()
    found = torch.bincount(tokens, minlength=6) / rows
    assert ((found - expected.exp()).abs() <= 4.5 * spread + 1e-5).all()
    again, _ = decode.choose(logits.expand(rows, -1), 0.7, False, seed, numbers, zeros)
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_the_plain_loop(device, family):
    model = model_of(family, device)
    plain = generate(model, left_padded(PROMPTS, PAD, device), TOKENS, EOS, PAD)
    engine = SlotEngine(model, 12, 6, TOKENS)
    found = engine.generate(request(device), Sampling(TOKENS, eos_id=EOS, greedy=True)).rollout()
    assert torch.equal(found.sequences.input_ids, plain.sequences.input_ids)
    assert torch.equal(found.answer_mask, plain.answer_mask)
    assert torch.equal(found.ended, plain.ended)
    assert_close(found.logprobs, plain.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_see_the_weights_of_each_optimizer_step(device, family, precision):
    """Captured before DeepSpeed's steps, a graph still gives what steps without one give, and the training pass."""
    settings = EngineConfig(precision=precision)
    trained = train_engine(
        Policy(model_of(family, device)), settings, OptimizerConfig(learning_rate=1e-2), 10, device, "test"
    )
    model = trained.module.model
    graphs, steps = SlotEngine(model, 12, 6, TOKENS), SlotEngine(model, 12, 6, TOKENS)
    steps.step = steps._step  # type: ignore[method-assign]
    sampling = Sampling(TOKENS, temperature=0.8, eos_id=EOS, seed=3)
    seen = []
    for _ in range(3):
        made = graphs.generate(request(device), sampling).rollout()
        alone = steps.generate(request(device), sampling).rollout()
        assert torch.equal(made.sequences.input_ids, alone.sequences.input_ids)
        assert_close(made.logprobs, alone.logprobs, atol=0, rtol=0)
        start_at = made.sequences.input_ids.shape[1] - made.answer_mask.shape[1]
        with torch.no_grad():
            again = trained(made.sequences, start_at, 0.8).logprobs
        gap = (made.logprobs - again)[made.answer_mask].abs()
        assert gap.mean() < (0.02 if precision == "bf16" else 0.005)
        seen.append((graphs._weights(), dict(graphs._graphs), made.logprobs.sum().item()))
        sequences = made.sequences

        def loss_of(part, place=start_at):
            return -trained(part, place).logprobs.sum()

        trained.optimizer_step([sequences], loss_of, float(made.answer_mask.sum()))
    assert seen[0][0] == seen[1][0] == seen[2][0]
    assert seen[0][1] == seen[2][1]
    assert len({total for *_, total in seen}) == 3
