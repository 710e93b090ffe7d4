"""The largest policy that PPO trains on one GPU: by the arithmetic of `rlhf plan`, and measured under a cap.

    python tests/bench/memory.py [CASE ...] [--predict | --tiny]

OPT's shapes with random weights, adapters (LoRA) on policy and critic, critic and reward model of OPT-350M's shape, 8
answers in one optimizer step, 256 prompt and 256 answer tokens, bf16, layers recomputed, no cache kept while the
networks train. Each case may use as much of the GPU as its name says, CUDA's context counted, and takes three whole
steps after two that are not counted, in a process of its own. `--predict` needs no GPU.

DeepSpeed-Chat names 2.7B on 32 GB, 6.7B on 40 and 48 GB, and 13B on 80 GB for the same (its README, on V100, A6000 and
A100).
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import OPTConfig

from tasks import fit
from tasks.config import EngineConfig, LoraConfig, PPOConfig
from tasks.shapes import GIB, GPUS, shape_of
from tasks.training.rollout_slots import SlotEngine
from tests.bench import ppo
from tests.bench.process import printed_apart, said, start_here
from tests.bench.records import hardware, record

BATCH = 8


@dataclass(frozen=True)
class Case:
    """A policy, and the GPU that it shall fit."""

    policy: OPTConfig
    gib: int
    dschat: float | None
    """Billions of parameters that DeepSpeed-Chat names for such a GPU."""
    gpus: int = 1
    """More than one: the policy under ZeRO-3."""

    @property
    def params_b(self) -> float:
        """Billions of parameters."""
        return shape_of(self.policy.to_dict()).parameters / 1e9


CASES = {
    "32gb": Case(ppo.opt(4096, 32, 32), 32, 2.7),
    "40gb": Case(ppo.opt(5120, 40, 40), 40, 6.7),
    "48gb": Case(ppo.opt(5120, 40, 40), 48, 6.7),
    "80gb": Case(ppo.opt(7168, 48, 56), 80, 13.0),
    "30b-zero3-2gpu": Case(ppo.opt(7168, 48, 56), 141, None, gpus=2),
}
ON_ONE = [name for name, case in CASES.items() if case.gpus == 1]


def size_of(case: Case, tiny: bool) -> ppo.Size:
    size = ppo.TINY if tiny else replace(ppo.FULL, policy=case.policy)
    return replace(size, batch=BATCH, micro_batch=4, repeats=3, compiled=False)


def config_of(size: ppo.Size, gpus: int = 1, each_token: bool = False) -> PPOConfig:
    engine = EngineConfig(precision=size.precision, gradient_checkpointing=True)
    frozen = EngineConfig(precision=size.precision)
    return PPOConfig(
        steps=100,
        rollout_batch_size=size.batch,
        batch_size=size.batch,
        micro_batch_size=size.micro_batch,
        ema_decay=None,
        rollout={"keep_cache": False, "gather": gpus > 1 and not each_token},
        policy_engine=engine.model_copy(update={"zero_stage": 3}) if gpus > 1 else engine,
        critic_engine=engine,
        reference_engine=frozen,
        reward_engine=frozen,
        policy_lora=LoraConfig(),
        critic_lora=LoraConfig(),
    )


def predicted(size: ppo.Size, gpus: int = 1) -> fit.Memory:
    """What `rlhf plan` says of a case."""
    config = config_of(size, gpus)
    policy, critic = (shape_of(shape.to_dict()) for shape in (size.policy, size.critic))
    options = fit.of_ppo(config, policy, critic, size.prompt, size.answer, gpus, GPUS["h100"])
    own = (config.policy_engine, config.policy_lora)
    return next(option.memory for option in options if (option.engine, option.lora) == own)


def capped(gib: int) -> None:
    """This process may use so much of the GPU, what CUDA itself takes counted."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((min(gib * GIB, total) - own) / total)


def measured(case: Case, tiny: bool, each_token: bool = False) -> dict[str, float]:
    device = start_here("cpu" if tiny else "cuda")
    if not tiny and case.gpus == 1:
        capped(case.gib)
    size = size_of(case, tiny)
    config = config_of(size, case.gpus, each_token)
    networks = ppo.networks_of(size, config, device, None if each_token else SlotEngine)
    said("networks made")
    return ppo.measured_steps(size, config, networks, device, size.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--predict", action="store_true", help="the arithmetic alone")
    parser.add_argument("--tiny", action="store_true", help="measure in small, on a CPU; records nothing")
    parser.add_argument("--here", action="store_true", help="measure the one case in this process, print JSON")
    parser.add_argument("--seconds", type=int, default=140, help="limit of each case")
    parser.add_argument(
        "--each-token", action="store_true", help="several GPUs: gather for each token; records nothing"
    )
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    if options.here:
        print(json.dumps(measured(CASES[options.cases[0]], options.tiny, options.each_token)))
        return
    print(f"{'case':16}{'policy':>8}{'predicted':>11}{'measured':>10}{'needed':>8}{'samples/s':>11}   on {hardware()}")
    for name in options.cases or ON_ONE:
        case = CASES[name]
        memory = predicted(size_of(case, options.tiny), case.gpus)
        line = f"{name:16}{case.params_b:7.1f}B{memory.allocated / GIB:11.1f}"
        if options.predict:
            print(f"{line}{'':10}{memory.needed / GIB:8.1f}")
            continue
        command = [__file__, name, "--here", *(["--tiny"] if options.tiny else [])]
        command += ["--each-token"] if options.each_token else []
        printed = printed_apart(name, command, options.seconds, case.gpus if case.gpus > 1 else 0)
        if printed is None:
            continue
        found: dict[str, Any] = json.loads(printed[-1])
        print(f"{line}{found['peak_gib']:10.1f}{memory.needed / GIB:8.1f}{found['samples_per_s']:11.2f}", flush=True)
        parts = ", ".join(f"{part} {found[f'{part}_s']:.2f}" for part in ("generate", "score", "train", "first"))
        print(f"{'':16}seconds: {parts}", flush=True)
        if not options.tiny and not options.each_token:
            dschat = None
            if case.dschat is not None:
                dschat = {"name": "DeepSpeed-Chat", "value": case.dschat, "source": "its README, such a GPU"}
            record("memory", name, "params_b", case.params_b, "billions", dschat, case.gpus)
            record("memory", name, "samples_per_s", found["samples_per_s"], "samples/s", None, case.gpus)
            plan = {"name": "rlhf plan", "value": memory.allocated / GIB, "source": "predicted"}
            record("memory", name, "peak_gib", found["peak_gib"], "GiB", plan, case.gpus)


if __name__ == "__main__":
    main()
