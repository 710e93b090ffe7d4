"""fp16 on a CPU, which DeepSpeed's accelerator does not admit to: two engines, one of which overflows once.

Run by test_engine.py in one process. Prints a JSON object a line, one for each of three joint steps.
"""

import json
import sys

import torch
from torch import nn

from tasks.config import EngineConfig, OptimizerConfig
from tasks.training import engine
from tasks.training.ema import own_part

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0, schedule="constant")


def main() -> None:
    stage = int(sys.argv[1])
    device = engine.start("cpu")
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    engine._check_device = lambda *arguments: None
    config = EngineConfig(
        precision="fp16", zero_stage=stage, deepspeed={"fp16": {"initial_scale_power": 8, "hysteresis": 1}}
    )
    torch.manual_seed(0)
    pair = [engine.train_engine(nn.Linear(4, 4), config, OPTIMIZER, 3, device, "engine") for _ in range(2)]
    for step in range(3):
        before = [weights(trained) for trained in pair]
        sizes = [1e6 if (step, number) == (1, 1) else 1.0 for number in range(2)]
        steps = [
            engine.Step(trained, [torch.ones(2, 4).half()], lambda x, t=trained, s=size: t(x).float().sum() * s, 2.0)
            for trained, size in zip(pair, sizes, strict=True)
        ]
        reports = engine.step_together(steps)
        result = {
            "skipped": [report.skipped for report in reports],
            "norms": [report.grad_norm if not report.skipped else None for report in reports],
            "changed": [weights(trained) != old for trained, old in zip(pair, before, strict=True)],
            "scales": [float(trained.engine.optimizer.loss_scaler.cur_scale) for trained in pair],
        }
        print(json.dumps(result), flush=True)


def weights(trained: engine.TrainEngine) -> list[float]:
    return [float(value) for p in trained.module.parameters() for value in own_part(p).flatten()]


main()
