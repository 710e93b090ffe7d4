"""bf16 by DeepSpeed stays on the path of fp32, whatever the ZeRO stage and the micro-batches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tasks.config import EngineConfig, OptimizerConfig
from tasks.training.batches import right_padded
from tasks.training.engine import TrainEngine, gathered, train_engine
from tasks.training.models import Policy, ScalarModel, freeze_first
from tasks.training.types import StepReport
from tests.tiny import tiny_llama

TEXT = [[3 + (row * place) % 40 for place in range(1, 9)] for row in range(1, 9)]


def engine_of(device, **settings) -> TrainEngine:
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(tiny_llama(50, initializer_range=0.2)))
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0.0)
    return train_engine(policy, EngineConfig(**settings), optimizer, 10, device, "test")


def steps(engine: TrainEngine, micro_batch: int, count: int = 3) -> list[StepReport]:
    """Optimizer steps on the same text."""
    batches = [right_padded(TEXT[row : row + micro_batch], 0, engine.device) for row in range(0, 8, micro_batch)]

    def loss_of(part):
        return -engine(part, 1).logprobs.sum()

    return [engine.optimizer_step(batches, loss_of, 56.0) for _ in range(count)]


def norms(device, micro_batch: int, **settings) -> list[float]:
    return [report.grad_norm for report in steps(engine_of(device, **settings), micro_batch)]


def weights(engine: TrainEngine) -> Tensor:
    return torch.cat([part.detach() for part in engine.engine.optimizer.fp32_groups_flat_partition])


@pytest.fixture(scope="module")
def expected(one_rank) -> list[float]:
    return norms(one_rank, 8, precision="fp32")


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("micro_batch", [8, 1])
def test_bf16_steps_as_fp32_does(one_rank, expected, stage, micro_batch):
    assert norms(one_rank, micro_batch, precision="bf16", zero_stage=stage) == pytest.approx(expected, rel=0.01)


def frozen_steps(device, **settings) -> tuple[list[float], ScalarModel]:
    """Gradient norms of three steps of a reward model whose first layer of two is frozen, and the model."""
    torch.manual_seed(0)
    config = tiny_llama(50, initializer_range=0.2, num_hidden_layers=2, num_labels=1, pad_token_id=0)
    model = ScalarModel(LlamaForSequenceClassification(config))
    freeze_first(model, 1, "reward.frozen_layers")
    optimizer = OptimizerConfig(learning_rate=4e-3, weight_decay=0.1, warmup_ratio=0.0)
    engine = train_engine(model, EngineConfig(**settings), optimizer, 10, device, "test")

    def loss_of(part):
        return engine(part)[:, -1].square().sum()

    batches = [right_padded(TEXT[row : row + 4], 0, device) for row in (0, 4)]
    return [engine.optimizer_step(batches, loss_of, 8.0).grad_norm for _ in range(3)], engine.module


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_layers_stay_as_they_are_in_bf16(one_rank, stage):
    expected, _ = frozen_steps(one_rank, precision="fp32")
    found, model = frozen_steps(one_rank, precision="bf16", zero_stage=stage)
    assert found == pytest.approx(expected, rel=0.02)
    torch.manual_seed(0)
    config = tiny_llama(50, initializer_range=0.2, num_hidden_layers=2, num_labels=1, pad_token_id=0)
    before = dict(LlamaForSequenceClassification(config).named_parameters())
    with gathered(model):
        after = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    same = [name for name, weights in before.items() if torch.equal(weights.bfloat16(), after[name])]
    assert same == [name for name in before if "embed_tokens" in name or "layers.0." in name]


@pytest.mark.parametrize(
    ("precision", "stage", "near"), [("fp32", 0, 1e-5), ("fp32", 1, 1e-5), ("fp32", 3, 1e-5), ("bf16", 1, 0.01)]
)
def test_the_head_learns_at_a_rate_of_its_own(one_rank, precision, stage, near):
    def model() -> ScalarModel:
        torch.manual_seed(0)
        config = tiny_llama(50, initializer_range=0.2, num_labels=1, pad_token_id=0)
        return ScalarModel(LlamaForSequenceClassification(config))

    batch, plain = right_padded(TEXT, 0, one_rank), model()
    head = plain.model.score.weight
    rest = [parameter for parameter in plain.parameters() if parameter is not head]
    adam = torch.optim.AdamW(
        [{"params": rest, "lr": 1e-3}, {"params": [head], "lr": 0.02}], betas=(0.9, 0.95), weight_decay=0.0
    )
    for _ in range(3):
        adam.zero_grad()
        (plain(batch)[:, -1].square().sum() / 8).backward()
        adam.step()
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0)
    settings = EngineConfig(precision=precision, zero_stage=stage)
    engine = train_engine(model(), settings, optimizer, 10, one_rank, "test", head_rate=0.02)
    reports = [engine.optimizer_step([batch], lambda part: engine(part)[:, -1].square().sum(), 8.0) for _ in range(3)]
    assert {report.learning_rate for report in reports} == {1e-3}
    with gathered(engine.module):
        for name, parameter in plain.named_parameters():
            found = engine.module.get_parameter(name).detach().float()
            torch.testing.assert_close(
                found, parameter.detach(), atol=near, rtol=near, msg=lambda told, n=name: n + told
            )


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_fewer_passes_take_deepspeeds_own_steps(one_rank, monkeypatch, micro_batch):
    ours = engine_of(one_rank, precision="bf16")
    assert type(ours.engine.optimizer).__name__ == "OneRankOptimizer"
    monkeypatch.setattr("tasks.training.one_rank.take_over", lambda *arguments: None)
    theirs = engine_of(one_rank, precision="bf16", deepspeed={"communication_data_type": "fp32"})
    found, expected = steps(ours, micro_batch), steps(theirs, micro_batch)
    assert min(report.grad_norm for report in expected) > 1  # all of them are clipped
    assert [report.loss for report in found] == [report.loss for report in expected]
    assert [report.grad_norm for report in found] == pytest.approx([report.grad_norm for report in expected])
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)


def test_steps_of_one_micro_batch_and_of_several_share_their_buffers(one_rank):
    """Gradients in bf16, in fp32, and in bf16 again, in the same memory."""
    ours, exact = (engine_of(one_rank, precision=precision) for precision in ("bf16", "fp32"))
    for micro_batch in (8, 2, 8, 4):
        found, expected = (steps(engine, micro_batch, 1)[0] for engine in (ours, exact))
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.01)
    optimizer = ours.engine.optimizer
    assert optimizer._bf16_gradients_flat[0].data_ptr() == optimizer.fp32_groups_gradients_flat[0].data_ptr()


def test_a_gradient_that_is_no_number_changes_nothing(one_rank):
    engine = engine_of(one_rank, precision="bf16")
    before = weights(engine).clone()
    report = engine.optimizer_step(
        [right_padded(TEXT, 0, one_rank)], lambda part: engine(part, 1).logprobs.sum() * torch.inf, 1.0
    )
    assert report.skipped
    assert torch.equal(weights(engine), before)
    assert not steps(engine, 8, 1)[0].skipped  # nothing of it is left


def test_bf16_resumes_bit_for_bit(one_rank, tmp_path: Path):
    whole, half = (engine_of(one_rank, precision="bf16") for _ in range(2))
    steps(whole, 4, 4)
    steps(half, 4, 2)
    half.save(tmp_path)
    resumed = engine_of(one_rank, precision="bf16")
    resumed.load(tmp_path)
    steps(resumed, 4, 2)
    assert torch.equal(weights(resumed), weights(whole))
