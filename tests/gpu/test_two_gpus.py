"""Two GPUs against one and against plain torch on the CPU: the programs of tests/integration, over NCCL.

All cases of one number of GPUs run in one process group, since starting one takes longer than most cases.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.process import printed_apart
from tests.integration.programs.ppo_steps import differences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SEVERAL = Path(__file__).parents[1] / "integration" / "programs" / "several.py"
GPU, BF16 = ["--device", "cuda"], ["--precision", "bf16"]
SECONDS = 400


def sft(stage: int, *more: str) -> list[str]:
    """Three steps in rows of 20 tokens, which are several micro-batches a rank."""
    return ["engine_steps", str(stage), "20", *GPU, *more]


def ppo(stage: int, epochs: int, *more: str) -> list[str]:
    return ["ppo_steps", str(stage), "--epochs", str(epochs), *GPU, *more]


ONE = {
    "plain": ["engine_steps", "-1", "0"],
    "sft-bf16": sft(1, *BF16),
    "ppo-1-fp32": ppo(1, 1),
    "ppo-2-fp32": ppo(1, 2),
    "ppo-2-bf16": ppo(1, 2, *BF16),
}
TWO = {
    **{f"zero{stage}": sft(stage) for stage in (1, 2, 3)},
    **{f"zero{stage}-bf16": sft(stage, *BF16) for stage in (1, 2, 3)},
    "ppo-1-zero1-fp32": ppo(1, 1),
    **{f"ppo-2-zero{stage}-fp32": ppo(stage, 2) for stage in (1, 2, 3)},
    **{f"ppo-2-zero{stage}-bf16": ppo(stage, 2, *BF16) for stage in (1, 2, 3)},
    "rollout-whole": ["rollout_ranks", "1", *GPU],
    "rollout-gathered": ["rollout_ranks", "3", *GPU],
    "lora": sft(3, "--lora"),
    "lora-compiled": sft(3, "--lora", "--compiled", "--checkpointing"),
    **{f"zero{stage}-compiled": sft(stage, "--compiled") for stage in (2, 3)},
    **{f"zero{stage}-compiled-bf16": sft(stage, "--compiled", *BF16) for stage in (2, 3)},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What the program of a case left."""
    folder = tmp_path_factory.mktemp("results")
    for cases, ranks in ((ONE, 1), (TWO, 2)):  # what fails is printed, and the cases after it have no result
        printed_apart(f"{ranks} GPUs", [str(SEVERAL), str(folder), json.dumps(cases)], SECONDS, ranks)

    def read(case: str) -> Any:
        path = folder / case / "result.json"
        assert path.exists(), f"{case} left no result; the output of the first test says why"
        return json.loads(path.read_text())

    return read


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3", "zero2-compiled", "zero3-compiled"])
def test_sft_in_fp32_has_the_losses_and_norms_of_plain_torch(result, case):
    plain, found = result("plain"), result(case)
    assert found["losses"] == pytest.approx(plain["losses"], abs=1e-4)
    assert found["norms"] == pytest.approx(plain["norms"], rel=2e-3)


@pytest.mark.parametrize(
    "case", ["zero1-bf16", "zero2-bf16", "zero3-bf16", "zero2-compiled-bf16", "zero3-compiled-bf16"]
)
def test_sft_in_bf16_has_the_losses_and_norms_of_one_gpu(result, case):
    one, two = result("sft-bf16"), result(case)
    assert two["losses"] == pytest.approx(one["losses"], rel=5e-3)
    assert two["norms"] == pytest.approx(one["norms"], rel=3e-2)


def test_adapters_of_compiled_and_recomputed_layers_under_zero_3_learn_as_eager_ones(result):
    eager, compiled = result("lora"), result("lora-compiled")
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=1e-4)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=2e-3)


@pytest.mark.parametrize("case", ["ppo-1-zero1", "ppo-2-zero1", "ppo-2-zero2", "ppo-2-zero3"])
def test_ppo_in_fp32_has_the_numbers_of_one_gpu(result, case):
    """Advantages after whitening, the adapted KL coefficient, losses and gradient norms, for given answers."""
    gaps = differences(result(f"{case[:5]}-fp32"), result(f"{case}-fp32"))
    assert gaps["ppo/next_kl_coef"] < 1e-6, gaps
    assert gaps["advantages"] < 1e-3, gaps
    assert max(gaps.values()) < 5e-3, gaps


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ppo_in_bf16_has_the_numbers_of_one_gpu(result, stage):
    gaps = differences(result("ppo-2-bf16"), result(f"ppo-2-zero{stage}-bf16"))
    assert gaps["ppo/next_kl_coef"] < 1e-6, gaps
    assert gaps["advantages"] < 5e-2, gaps
    # Sums that nearly cancel, as KL and the policy's loss, have no leading digits in bf16 to compare.
    assert max(gaps[f"ppo/{name}"] for name in ("value_loss", "policy_grad_norm", "critic_grad_norm")) < 0.1, gaps


@pytest.mark.parametrize("case", ["rollout-whole", "rollout-gathered"])
def test_graphs_of_each_gpu_answer_as_the_plain_loop(result, case):
    found = result(case)
    assert [(row["rank"], row["device"]) for row in found] == [(0, "cuda:0")] * 3 + [(1, "cuda:1")] * 3
    assert all(row["same"] for row in found), found
    assert max(row["gap"] for row in found) < 1e-3, found
