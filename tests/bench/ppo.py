"""PPO's speed: rollouts alone, and whole steps with generation, scoring and training counted.

    python tests/bench/ppo.py [CASE ...] [--tiny]

The work is that of DeepSpeed-Chat's benchmark on one GPU: OPT-1.3B's shape as policy and reference, OPT-350M's as
critic and reward model, random weights, 256 prompt and 256 answer tokens, 64 answers in one optimizer step, full
fine-tuning in bf16 with fp32 master weights, one epoch. The first step, in which all is compiled and captured, is shown
apart. `--tiny` runs every case in small on a CPU and records nothing.

`fixed-1.3b-b64-2gpu` is the same with 64 answers on each of two GPUs, 128 in one optimizer step, against one GPU with
64 in the same run. `--equal` compares numbers instead of speed: two GPUs with 32 rows each and one with 64, on given
answers (tests/integration/programs/ppo_steps.py).
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig

from tasks.config import EngineConfig, OptimizerConfig, PPOConfig
from tasks.training import ppo
from tasks.training.ema import Ema
from tasks.training.engine import frozen_engine, train_engine
from tasks.training.experience import GatheredSlots, Networks
from tasks.training.job import Job
from tasks.training.lora import Base, add_adapters
from tasks.training.models import Policy, ScalarModel
from tasks.training.ranks import rank, world_size
from tasks.training.rollout_slots import Batch, Request, Sampling, SlotEngine
from tests.bench.process import printed_apart, said, start_alone, start_here
from tests.bench.records import hardware, last, record

DSCHAT = {"name": "DeepSpeed-Chat", "value": 11.4, "source": "same work on one H100, scoring left out; TRL 1.12: 5.2"}
VLLM = {64: 1.13, 256: 2.98}


@dataclass(frozen=True)
class Size:
    """What `--tiny` makes smaller."""

    policy: OPTConfig
    critic: OPTConfig
    prompt: int = 256
    answer: int = 256
    batch: int = 64
    micro_batch: int = 32
    precision: Any = "bf16"
    compiled: bool = True
    repeats: int = 5
    zero_stage: Any = 0


def opt(hidden: int, layers: int, heads: int, **changes: Any) -> OPTConfig:
    return OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=changes.pop("word_embed_proj_dim", hidden),
        dropout=0.0,
        num_labels=1,
        **changes,
    )


FULL = Size(opt(2048, 24, 32), opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False))
TINY = Size(
    *(opt(32, 2, 2, vocab_size=100, max_position_embeddings=64) for _ in range(2)),
    prompt=12,
    answer=8,
    batch=8,
    micro_batch=4,
    precision="fp32",
    compiled=False,
    repeats=2,
)


def model_of(auto_class: Any, config: OPTConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, made on the device."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = auto_class.from_config(config)
    torch.set_default_dtype(torch.float32)
    return model


def partitioned_model_of(auto_class: Any, config: OPTConfig, precision: str, device: torch.device) -> Any:
    """The same in ZeRO-3's parts: no rank ever holds more than one whole module.

    Each rank draws its own part of the matrices.
    """
    import deepspeed
    from transformers.initialization import no_init_weights

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
        # Else DeepSpeed replaces torch's linear function for good, in every network.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
    with deepspeed.zero.Init(config_dict_or_path=settings), no_init_weights(), device:
        model = auto_class.from_config(config)
    generator = torch.Generator(device).manual_seed(rank())
    for name, parameter in model.named_parameters():
        if len(parameter.ds_shape) > 1:
            parameter.ds_tensor.normal_(0.0, config.init_std, generator=generator)
        else:  # a norm's weight, or a bias
            parameter.ds_tensor.fill_(float(name.endswith("weight")))
    return model


def prompts_of(size: Size, count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, size.policy.vocab_size) for _ in range(size.prompt)] for _ in range(count)]


def clocked(action: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rollout(size: Size, device: torch.device, rows: int) -> dict[str, float]:
    """Seconds of a rollout whose answers all reach their limit."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model_of(AutoModelForCausalLM, size.policy, dtype, device).eval()
    engine = SlotEngine(model, rows, size.prompt, size.answer)
    ids = torch.tensor(prompts_of(size, rows), device=device)
    request = Request(ids, torch.ones_like(ids))
    seeds = iter(range(100))

    def once() -> None:
        engine.generate(request, Sampling(size.answer, seed=next(seeds)))

    first = clocked(once, device)
    seconds = statistics.median(clocked(once, device) for _ in range(size.repeats))
    tokens = rows * size.answer / seconds
    cache = engine.cache_bytes / 2**30
    return {"rollout_s": seconds, "tokens_per_s": tokens, "first_s": first, "cache_gib": cache}


class GivenLengths(SlotEngine):
    """Ends the answers of random weights as a chat model's end: exponential lengths, mean a third of the limit."""

    def generate(self, request: Any, sampling: Any) -> Batch:
        draw = random.Random(sampling.seed)
        lengths = [int(draw.expovariate(3 / self.answer_tokens)) + 1 for _ in request.prompt_ids]
        request.limits = torch.tensor(lengths)
        return super().generate(request, sampling)


def whole_steps(
    size: Size, device: torch.device, prompts: int, real_lengths: bool = False, extras: bool = False
) -> dict[str, float]:
    """Samples per second of whole PPO steps.

    Args:
        prompts: of a rollout, and so of a pool, on each GPU.
        real_lengths: answers end early; else none does.
        extras: with PTX and EMA.
    """
    # Real lengths give each micro-batch a shape of its own, which compiled layers would be compiled for anew.
    compiled = size.compiled and not real_lengths
    engine = EngineConfig(zero_stage=size.zero_stage, precision=size.precision, compile_layers=compiled)
    settings: dict[str, Any] = {
        "steps": 100,
        "rollout_batch_size": prompts * world_size(),
        "batch_size": size.batch * world_size(),
        "micro_batch_size": size.micro_batch,
        "ema_decay": 0.992 if extras else None,
        "ptx_coef": 1.0 if extras else 0.0,
        "ptx_batch_size": size.batch,
    }
    engines = {f"{network}_engine": engine for network in ("policy", "critic", "reference", "reward")}
    config = PPOConfig(**settings, **engines, rollout={"keep_cache": not real_lengths})
    networks = networks_of(size, config, device, GivenLengths if real_lengths else SlotEngine)
    return measured_steps(size, config, networks, device, 2 if real_lengths else size.repeats)


def networks_of(
    size: Size,
    config: PPOConfig,
    device: torch.device,
    slots: Callable[..., Any] | None = SlotEngine,
    learning_rate: float = 1e-6,
) -> Networks:
    """The four networks with random weights; an adapted policy is its own reference."""
    adam = OptimizerConfig(learning_rate=learning_rate, eps=1e-5)
    half = torch.bfloat16 if size.precision == "bf16" else torch.float32

    def trained(wrapper: Any, auto_class: Any, shape: OPTConfig, network: str) -> Any:
        lora = getattr(config, f"{network}_lora")
        if lora is not None and getattr(config, f"{network}_engine").zero_stage == 3:
            model = partitioned_model_of(auto_class, shape, size.precision, device)
        else:  # an adapted base has no master weights, and in fp32 would not fit
            model = model_of(auto_class, shape, torch.float32 if lora is None else half, device)
        if lora is not None:
            add_adapters(model, lora, network)
        return train_engine(wrapper(model), getattr(config, f"{network}_engine"), adam, 100, device, network)

    policy = trained(Policy, AutoModelForCausalLM, size.policy, "policy")
    if config.policy_lora is not None:
        reference: Any = Base(policy)
    else:
        same = Policy(model_of(AutoModelForCausalLM, size.policy, half, device))
        reference = frozen_engine(same, config.reference_engine, device, "reference")
    reward = ScalarModel(model_of(AutoModelForSequenceClassification, size.critic, half, device))
    rows = min(config.rollout_batch_size // world_size(), 256)
    longest = (rows, size.prompt, size.answer)
    sampler: Any = None
    if config.rollout.gather:
        sampler = GatheredSlots(policy.module, *longest)
    elif slots is not None:
        sampler = slots(policy.module.model, *longest)
    return Networks(
        policy=policy,
        critic=trained(ScalarModel, AutoModelForSequenceClassification, size.critic, "critic"),
        reference=reference,
        reward_model=frozen_engine(reward, config.reward_engine, device, "reward"),
        eos=-1,
        pad=1,
        slots=sampler,
    )


def measured_steps(
    size: Size, config: PPOConfig, networks: Networks, device: torch.device, repeats: int
) -> dict[str, float]:
    """Samples per second of whole steps, the median of some, after two that are not counted."""
    prompts = config.rollout_batch_size
    stage = Job(
        "ppo",
        Path(tempfile.mkdtemp()),
        {"seed": 0, "max_answer_tokens": size.answer},
        {},
        device,
        _ignore,
        _ignore,
        _never,
    )
    text = [{"tokens": ids * 2} for ids in prompts_of(size, size.batch)] if config.ptx_coef else None
    data: Any = ppo.Data([{"prompt": ids} for ids in prompts_of(size, prompts)], text)  # type: ignore[arg-type]
    ema = None if config.ema_decay is None else Ema(networks.policy.module, config.ema_decay)
    state = ppo.State(config.kl_coef)
    metrics: list[dict[str, float]] = []

    def step() -> None:
        metrics.append(ppo.train_on_pool(stage, config, networks, ema, data, state, len(metrics)))

    first = clocked(step, device)
    said(f"first step taken, {first:.1f} s")
    clocked(step, device)
    seconds = statistics.median(clocked(step, device) for _ in range(repeats))
    parts = {
        f"{part}_s": statistics.median(row[f"time/{part}_s"] for row in metrics[2:])
        for part in ("generate", "score", "train")
    }
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    gap = metrics[-1]["rollout/logprob_gap"]
    return {"samples_per_s": prompts / seconds, **parts, "first_s": first, "peak_gib": peak, "logprob_gap": gap}


def _ignore(*_: Any) -> None:
    return None


def _never() -> bool:
    return False


CASES: dict[str, Callable[[Size, torch.device], dict[str, float]]] = {
    "rollout-b64": lambda size, device: rollout(size, device, size.batch),
    "rollout-b256": lambda size, device: rollout(size, device, 4 * size.batch),
    "fixed-1.3b-b64": lambda size, device: whole_steps(size, device, size.batch),
    "fixed-1.3b-b64-ptx-ema": lambda size, device: whole_steps(size, device, size.batch, extras=True),
    "eos-1.3b-b64": lambda size, device: whole_steps(size, device, 8 * size.batch, real_lengths=True),
    "fixed-1.3b-b64-2gpu": lambda size, device: whole_steps(size, device, size.batch),
}
ON_TWO = [name for name in CASES if name.endswith("-2gpu")]
ON_ONE = [name for name in CASES if name not in ON_TWO]
STEPS = Path(__file__).parents[1] / "integration" / "programs" / "ppo_steps.py"


def baseline(case: str) -> dict[str, Any] | None:
    """What a case is compared with."""
    if case.startswith("rollout"):
        return {
            "name": "vLLM 0.22",
            "value": VLLM[int(case.removeprefix("rollout-b"))],
            "source": "same work, one H100",
        }
    if case.startswith("eos"):
        return {"name": "fixed-1.3b-b64", "value": last("ppo", "fixed-1.3b-b64"), "source": "the last record"}
    return DSCHAT


def show(case: str, found: dict[str, float]) -> None:
    for number, (metric, value) in enumerate(found.items()):
        print(f"{case if number == 0 else '':24}{metric:16}{value:12.4g}", flush=True)


def compare_gpus(case: str, chosen: argparse.Namespace) -> None:
    """Two GPUs against one, each side in processes of its own. SystemExit if a side fails."""
    flags = [f"--{name}" for name in ("tiny", "eager") if getattr(chosen, name)]
    flags += ["--zero", str(chosen.zero)] + (["--micro-batch", str(chosen.micro_batch)] if chosen.micro_batch else [])
    sides = []
    for name, ranks in ((case.removesuffix("-2gpu"), 0), (case, 2)):
        lines = printed_apart(name, [__file__, name, "--here", *flags], chosen.seconds, ranks)
        if lines is None:
            raise SystemExit(1)
        sides.append(json.loads(lines[-1]))
        show(name, sides[-1])
    one, two = (side["samples_per_s"] for side in sides)
    print(f"{case:24}{'speedup':16}{two / one:12.4g}", flush=True)
    if not (chosen.tiny or chosen.eager):
        beside = {"name": "one GPU, 64 rows, same run", "value": one}
        record("ppo", case, "samples_per_s", two, "samples/s", beside, 2)
        record("ppo", case, "speedup", two / one, "x", beside, 2)


def compare_numbers(chosen: argparse.Namespace) -> None:
    """PPO's numbers of two GPUs beside those of one with the same rows. SystemExit if a side fails."""
    from tests.integration.programs.ppo_steps import differences

    results = []
    small = ["--rows", "16"] if chosen.tiny else ["--rows", "64", "--device", "cuda", "--precision", "bf16", "--full"]
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            command = [str(STEPS), folder, str(chosen.zero), "--epochs", "2", *small]
            if printed_apart(f"{ranks} GPUs", command, chosen.seconds, ranks) is None:
                raise SystemExit(1)
            results.append(json.loads((Path(folder) / "result.json").read_text()))
    one, two = results
    gaps = differences(one, two)
    print(f"{'number':28}{'pool':>5}{'one GPU':>14}{'two':>14}   on {hardware()}")
    for name in one["pools"][0]:
        for number, (alone, shared) in enumerate(zip(one["pools"], two["pools"], strict=True)):
            print(f"{name if number == 0 else '':28}{number:5}{alone[name]:14.6g}{shared[name]:14.6g}")
    print("largest difference, relative; of advantages absolute:")
    print("\n".join(f"{name:28}{gap:12.1e}" for name, gap in gaps.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: those on one GPU")
    parser.add_argument("--tiny", action="store_true", help="in small, on a CPU; records nothing")
    parser.add_argument("--eager", action="store_true", help="without compiled layers; records nothing")
    parser.add_argument("--micro-batch", type=int, help=f"rows of a forward pass in training; {FULL.micro_batch}")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage of the networks on two GPUs; 1")
    parser.add_argument(
        "--equal", action="store_true", help="numbers of two GPUs against those of one; records nothing"
    )
    parser.add_argument("--seconds", type=int, default=140, help="limit of each side of what runs on two GPUs")
    parser.add_argument("--here", action="store_true", help="run the one case in this process, print JSON")
    chosen = parser.parse_args()
    if unknown := set(chosen.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    size = TINY if chosen.tiny else replace(FULL, compiled=not chosen.eager)
    if chosen.micro_batch:
        size = replace(size, micro_batch=chosen.micro_batch)
    if chosen.here:
        size = replace(size, zero_stage=chosen.zero if "RANK" in os.environ else 0)
        print(json.dumps(CASES[chosen.cases[0]](size, start_here("cpu" if chosen.tiny else "cuda"))))
        return
    if chosen.equal:
        return compare_numbers(chosen)
    print(f"{'case':24}{'metric':16}{'value':>12}   on {hardware()}")
    for case in chosen.cases:
        if case in ON_TWO:
            compare_gpus(case, chosen)
    alone = [case for case in chosen.cases if case in ON_ONE] if chosen.cases else ON_ONE
    device = start_alone("cpu" if chosen.tiny else "cuda") if alone else None
    for case in alone:
        assert device is not None
        found = CASES[case](size, device)
        show(case, found)
        metric, value = next(iter(found.items()))
        if not (chosen.tiny or chosen.eager):
            unit = "s" if metric.endswith("_s") and not metric.endswith("per_s") else "samples/s"
            record("ppo", case, metric, value, unit, baseline(case))
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
