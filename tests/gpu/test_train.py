"""Training on a GPU in half precision against eager fp32 on the CPU by transformers' own attention and log_softmax."""

import copy
import os

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.config import EngineConfig, OptimizerConfig
from tasks.training.attention import inside
from tasks.training.batches import language_batch, language_tokens
from tasks.training.engine import _compile_layers, start, train_engine
from tasks.training.models import Policy
from tasks.training.packing import best_fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = SHAPE | {"intermediate_size": 512, "max_position_embeddings": 256, "initializer_range": 0.1}
FAMILIES = {
    "llama": ("llama", WIDE | {"num_key_value_heads": 2}),
    "mistral-window": ("mistral", WIDE | {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen3": ("qwen3", WIDE | {"num_key_value_heads": 2, "head_dim": 64}),
    "opt": ("opt", SHAPE | {"ffn_dim": 512, "word_embed_proj_dim": 256, "dropout": 0.0, "init_std": 0.1}),
    "gpt_neox": ("gpt_neox", WIDE),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, weight_decay=0.1)
TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1.2e-2}
STEPS = 3


def rows() -> list[dict]:
    draw = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 500, (length,), generator=draw).tolist()

    return [{"prompt": tokens(5 + 7 * n % 60), "answer": tokens(3 + 11 * n % 90)} for n in range(STEPS * 16)]


@pytest.fixture(scope="module")
def device():
    ports = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29581}
    os.environ.update({name: str(value) for name, value in ports.items()})
    return start("cuda")


def model_of(family: str):
    torch.manual_seed(0)
    kind, shape = FAMILIES[family]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))


def stock_loss(model, batch: list[dict]) -> Tensor:
    """Token mean over a batch, a sample at a time, by transformers' eager attention."""
    total, tokens = torch.zeros(()), 0
    for row in batch:
        logits = model(torch.tensor([row["prompt"] + row["answer"]])).logits[0, len(row["prompt"]) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row["answer"]), reduction="sum")
        tokens += len(row["answer"])
    return total / tokens


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_attention_gives_the_logprobs_and_gradients_of_fp32_samples(device, family, dtype):
    policy = Policy(model_of(family))
    batch = language_batch(rows()[:16], torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH):
        exact = policy(batch.row, batch.learnt).logprobs
        exact.mean().backward()
    mine = copy.deepcopy(policy).to(device, dtype)
    mine.zero_grad()
    batch = language_batch(rows()[:16], device)
    found = mine(batch.row, batch.learnt).logprobs
    (found.mean() * 128).backward()
    error = (found.cpu() - exact).abs()
    assert error.mean() < TOLERANCE[dtype]
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters()])
    got = torch.cat([p.grad.flatten() for p in mine.parameters()]).cpu().float() / 128
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=0) > 0.995


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_samples_of_one_length_give_the_logprobs_and_gradients_of_fp32(device, compiled, dtype):
    """By cuDNN's attention on Hopper."""
    policy = Policy(model_of("llama"))
    draw = torch.Generator().manual_seed(1)
    samples = [{"prompt": [3], "answer": torch.randint(3, 500, (127,), generator=draw).tolist()} for _ in range(8)]
    batch = language_batch(samples, torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH):
        exact = policy(batch.row, batch.learnt).logprobs
        exact.mean().backward()
    mine = copy.deepcopy(policy).to(device, dtype)
    mine.zero_grad()
    if compiled:
        _compile_layers(mine)
    batch = language_batch(samples, device)
    assert inside(batch.row)["by_cudnn"] == (torch.cuda.get_device_capability()[0] == 9)
    found = mine(batch.row, batch.learnt).logprobs
    (found.mean() * 128).backward()
    assert (found.cpu() - exact).abs().mean() < TOLERANCE[dtype]
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters()])
    got = torch.cat([p.grad.flatten() for p in mine.parameters()]).cpu().float() / 128
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=0) > 0.995


@torch.no_grad()
def test_no_token_sees_another_sample(device):
    policy = Policy(model_of("llama")).to(device, torch.bfloat16)
    samples = rows()[:4]
    counts = [len(row["answer"]) for row in samples]
    batch = language_batch(samples, device)
    before = policy(batch.row, batch.learnt).logprobs.split(counts)
    other = {key: [token - 1 for token in samples[1][key]] for key in ("prompt", "answer")}
    batch = language_batch([samples[0], other, *samples[2:]], device)
    after = policy(batch.row, batch.learnt).logprobs.split(counts)
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, False, True, True]


@pytest.fixture(scope="module")
def eager() -> dict[str, list[float] | Tensor]:
    """Three steps in fp32 by plain torch: losses, and how the weights changed."""
    model = model_of("llama")
    model.set_attn_implementation("eager")
    start_weights = flat(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    losses = []
    for step in range(STEPS):
        loss = stock_loss(model, rows()[step * 16 : (step + 1) * 16])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "change": flat(model) - start_weights}


def flat(model) -> Tensor:
    return torch.cat([p.detach().float().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_three_steps_of_compiled_layers_and_flat_buffers_are_those_of_plain_torch(
    device, eager, precision, stage, compiled
):
    policy = Policy(model_of("llama"))
    before = flat(policy.model)
    config = EngineConfig(zero_stage=stage, precision=precision, compile_layers=compiled)
    engine = train_engine(policy, config, OPTIMIZER, STEPS, device, "engine")
    losses = []
    for step in range(STEPS):
        batch = rows()[step * 16 : (step + 1) * 16]
        packs = best_fit([language_tokens(row) for row in batch], 512)
        batches = [language_batch([batch[index] for index in pack], device) for pack in packs]
        tokens, sums = sum(len(part.learnt) for part in batches), []

        def loss_of(part, sums=sums):
            sums.append(-engine(part.row, part.learnt).logprobs.sum())
            return sums[-1]

        engine.optimizer_step(batches, loss_of, tokens)
        losses.append(float(sum(part.detach() for part in sums)) / tokens)
    exact = precision == "fp32"
    assert losses == pytest.approx(eager["losses"], rel=1e-3 if exact else 1e-2)
    if exact:  # bf16 weights round their own changes away; there the losses tell
        change = flat(engine.module.model) - before
        assert torch.nn.functional.cosine_similarity(change, eager["change"], dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_in_one_pass_is_torchs(device, dtype):
    from tasks.training.adam_triton import adam

    size, settings = 5003, {"betas": (0.9, 0.95), "eps": 1e-8}
    draw = torch.Generator(device).manual_seed(0)
    start = torch.randn(size, generator=draw, device=device)
    parameter = torch.nn.Parameter(start.double())
    reference = torch.optim.AdamW([parameter], lr=3e-3, weight_decay=0.1, **settings)
    master, mean, square, weights = start.clone(), *torch.zeros(2, size, device=device), start.bfloat16()
    for step in range(1, 5):
        gradient = torch.randn(size, generator=draw, device=device).to(dtype)
        parameter.grad = gradient.double() / 4
        reference.step()
        adam(master, mean, square, gradient, weights, step, clipping=0.25, rate=3e-3, decay=0.1, **settings)
    torch.testing.assert_close(master, parameter.detach().float(), rtol=1e-6, atol=1e-7)
    assert torch.equal(weights, master.bfloat16())
