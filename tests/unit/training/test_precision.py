"""bf16 by DeepSpeed stays on the path of fp32, whatever the ZeRO stage and the micro-batches."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tasks.config import EngineConfig, OptimizerConfig
from tasks.training.batches import right_padded
from tasks.training.engine import train_engine
from tasks.training.models import Policy
from tests.tiny import tiny_llama

TEXT = [[3 + (row * place) % 40 for place in range(1, 9)] for row in range(1, 9)]


def norms(device, micro_batch: int, **settings) -> list[float]:
    """Gradient norms of three optimizer steps on the same text."""
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(tiny_llama(50, initializer_range=0.2)))
    engine = train_engine(policy, EngineConfig(**settings), OptimizerConfig(learning_rate=1e-2), 10, device, "test")
    batches = [right_padded(TEXT[row : row + micro_batch], 0, device) for row in range(0, 8, micro_batch)]

    def loss_of(part):
        return -engine(part, 1).logprobs.sum()

    return [engine.optimizer_step(batches, loss_of, 56.0).grad_norm for _ in range(3)]


@pytest.fixture(scope="module")
def expected(one_rank) -> list[float]:
    return norms(one_rank, 8, precision="fp32")


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("micro_batch", [8, 1])
def test_bf16_steps_as_fp32_does(one_rank, expected, stage, micro_batch):
    assert norms(one_rank, micro_batch, precision="bf16", zero_stage=stage) == pytest.approx(expected, rel=0.01)
