"""Speed of SFT and reward-model training, side by side with the plain way on the same samples.

    python tests/bench/train.py [CASE ...] [--tiny] [--hub DIR] [--tokenizer DIR]

The plain way is transformers' model on padded batches with its own loss, DeepSpeed ZeRO-0, bf16 with fp32 master
weights and gradient checkpointing. Ours is what the stages run: packed rows, attention inside samples, the loss without
the logits. Each side is a process of its own; the first steps, in which layers are compiled, are timed apart.
MFU counts 6 FLOP a parameter and token plus causal attention, no recomputation, over 989 TFLOP/s (H100, dense bf16);
embeddings count where they are the head too. `--tiny` runs every case in small on a CPU and records nothing.

The cases that end with 2gpu compare two GPUs with one on the same global batches of 16 samples: 8 a GPU, or one GPU
with two micro-batches of 8, each at its best setting (ZeRO-1 on one, which has no one to share with). The one GPU's
speed is the better of that and of batches of 8. Weights, samples and their order are the same, so the losses have to
be: both curves are printed, and the largest relative difference. The fp32 cases are for that alone. Their tokens are of
few kinds, so that there is something to learn.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tasks.config import EngineConfig, OptimizerConfig
from tasks.training.batches import chunks, language_batch, language_tokens, pair_batch, pair_tokens, right_padded
from tasks.training.engine import train_engine
from tasks.training.losses import pairwise_loss
from tasks.training.models import Policy, ScalarModel, without_dropout
from tasks.training.ranks import world_size
from tasks.training.reward import scores
from tasks.training.supervised import own_share
from tests.bench.process import printed_apart, said, start_here
from tests.bench.records import hardware, record

SHAPES = Path(__file__).parent / "shapes"
PEAK = 989e12


@dataclass(frozen=True)
class Case:
    """One optimizer batch and how each side cuts it up."""

    shape: str
    pairs: bool
    batch_size: int
    plain_micro: int
    """Samples (or pairs) in one forward pass of the plain way."""
    micro_batch_tokens: int
    zero_stage: Any = 0
    gradient_checkpointing: bool = False
    compiled: bool = True
    precision: Any = "bf16"
    warmup: int = 3
    steps: int = 8
    gpus: int = 1
    """More than one: our way on so many against our way on one."""
    kinds: int = 30_000
    """Of tokens."""
    learning_rate: float = 1e-5
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw keys, for `--try 'deepspeed={zero_optimization: {overlap_comm: false}}'`."""


TWO_GPUS = Case("llama-1.7b", False, 16, 8, 16384, gpus=2, kinds=300, learning_rate=1e-4)
EXACT = replace(TWO_GPUS, batch_size=4, micro_batch_tokens=4096, precision="fp32", compiled=False, warmup=1, steps=4)


CASES = {
    "sft-1.7b-2048": Case("llama-1.7b", False, 8, 8, 16384),
    "sft-real-lengths": Case("smollm2-135m", False, 256, 16, 32768, steps=4),
    "reward-350m": Case("opt-350m", True, 64, 16, 65536),
    "zero2-2gpu": replace(TWO_GPUS, zero_stage=2),
    "zero3-2gpu": replace(TWO_GPUS, zero_stage=3),
    "zero2-2gpu-fp32": replace(EXACT, zero_stage=2),
    "zero3-2gpu-fp32": replace(EXACT, zero_stage=3),
}
ON_ONE = [name for name, case in CASES.items() if case.gpus == 1]
METRICS = {"mfu": "of 989 TFLOP/s", "tokens_per_s": "tokens/s", "speedup": "x"}


def samples(name: str, case: Case, options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """The optimizer batches of a case."""
    draw = random.Random(0)
    count, most = case.warmup + case.steps, 64 if options.tiny else 512

    def tokens(length: int) -> list[int]:
        return [draw.randrange(5, case.kinds) for _ in range(length)]

    if name == "sft-real-lengths":
        rows = real_rows(count * case.batch_size, options)
    elif case.pairs:  # prompt and answers of 1/4 to 1/2 of the longest pair each
        rows = [
            {
                "prompt": tokens(draw.randint(most // 4, most // 2)),
                "chosen": tokens(draw.randint(most // 4, most // 2)),
                "rejected": tokens(draw.randint(most // 4, most // 2)),
                "weight": 1.0,
            }
            for _ in range(count * case.batch_size)
        ]
    else:
        full = 64 if options.tiny else 2048
        rows = [{"prompt": tokens(1), "answer": tokens(full - 1)} for _ in range(count * case.batch_size)]
    return [list(batch) for batch in chunks(rows, case.batch_size)]


def real_rows(count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts and chosen answers of rm-static in SmolLM2's tokens, cut to 256 each as the default config does."""
    import pandas as pd

    path = Path(options.hub) / "Dahoas/rm-static/data" if options.hub else None
    source = sorted(path.glob("train-*.parquet"))[0] if path else "hf://datasets/Dahoas/rm-static/data/train.parquet"
    table = pd.read_parquet(source, columns=["prompt", "chosen"]).sample(count, random_state=0)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    prompts, answers = (tokenizer(list(table[column]))["input_ids"] for column in ("prompt", "chosen"))
    eos = [tokenizer.eos_token_id]
    return [{"prompt": p[-256:], "answer": a[:255] + eos} for p, a in zip(prompts, answers, strict=True)]


class Plain(nn.Module):
    """Transformers' model with its own loss on padded batches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch, use_cache=False)


def plain_batch(case: Case, rows: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
    sides = ("chosen", "rejected") if case.pairs else ("answer",)
    padded = right_padded([row["prompt"] + row[side] for side in sides for row in rows], 0, device)
    batch = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask.long()}
    if not case.pairs:
        learnt = padded.attention_mask.clone()
        for index, row in enumerate(rows):
            learnt[index, : len(row["prompt"])] = False
        batch["labels"] = padded.input_ids.masked_fill(~learnt, -100)
    return batch


def run_side(name: str, case: Case, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step and tokens of one side, in this process. How far it is goes to stderr."""
    device = start_here("cpu" if options.tiny else "cuda")
    batches = samples(name, case, options)
    said("samples made")
    shape = yaml.safe_load((SHAPES / f"{'tiny' if options.tiny else case.shape}.yaml").read_text())
    config = without_dropout(AutoConfig.for_model(**shape, pad_token_id=0, num_labels=1))
    auto_class = AutoModelForSequenceClassification if case.pairs else AutoModelForCausalLM
    torch.manual_seed(0)
    with device:
        model = auto_class.from_config(config)
    engine_config = EngineConfig(
        zero_stage=case.zero_stage if side in ("ours", "two") else 0,
        precision=case.precision,
        gradient_checkpointing=case.gradient_checkpointing or side == "plain",
        compile_layers=case.compiled and side != "plain",
        deepspeed=case.deepspeed if side in ("ours", "two") else {},
    )
    wrapped = Plain(model) if side == "plain" else ScalarModel(model) if case.pairs else Policy(model)
    theirs = patch("tasks.training.one_rank.take_over") if side == "plain" else nullcontext()
    with theirs:  # the plain way steps by DeepSpeed's own optimizer
        optimizer = OptimizerConfig(learning_rate=case.learning_rate)
        engine = train_engine(wrapped, engine_config, optimizer, len(batches), device, "engine")
    said("engine made")

    def plain_loss(batch: dict[str, Tensor]) -> Tensor:
        output = engine(**batch)
        if not case.pairs:
            return output.loss
        chosen, rejected = output.logits.float().squeeze(-1).chunk(2)
        return pairwise_loss(chosen, rejected, torch.ones_like(chosen))

    def our_loss(batch: Any) -> Tensor:
        if case.pairs:
            return pairwise_loss(*scores(engine, batch), batch.weight)
        return -engine(batch.row, batch.learnt).logprobs.sum()

    tokens_of, collate = (pair_tokens, pair_batch) if case.pairs else (language_tokens, language_batch)

    curve: list[tuple[float, float]] = []

    def step(rows: list[dict[str, Any]]) -> None:
        if side == "plain":
            micro = [plain_batch(case, part, device) for part in chunks(rows, case.plain_micro)]
            denominator = float(len(rows) if case.pairs else len(micro))
            engine.optimizer_step(micro, plain_loss, denominator)
            return
        micro = [collate(part, device) for part in own_share(rows, tokens_of, case.micro_batch_tokens)]
        denominator = float(len(rows) if case.pairs else sum(len(batch.learnt) for batch in micro))
        report = engine.optimizer_step(micro, our_loss, denominator)
        curve.append((report.loss, report.grad_norm))

    warm = [clocked(step, [batch], device) for batch in batches[: case.warmup]]
    said(f"steps before those that count: {', '.join(f'{seconds:.2f}' for seconds in warm)} s")
    # No wait between steps: the next batch is prepared while the GPU is at the last update, as in the stages' loop.
    per_step = clocked(step, batches[case.warmup :], device) / case.steps
    if options.profile:
        profile(step, batches[-1])
    measured = batches[case.warmup :]
    lengths = [length for batch in measured for row in batch for length in lengths_of(case, row)]
    flop = sum(flop_of(config, wrapped, length) for length in lengths) / len(measured)
    tokens = sum(lengths) / len(measured)
    found = {
        "mfu": flop / per_step / PEAK / world_size(),
        "tokens_per_s": tokens / per_step,
        "step_s": per_step,
        "first_s": warm[0],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "curve": list(curve),
    }
    if side == "one":
        parts = [batch[: case.batch_size // case.gpus] for batch in measured]
        found["part_tokens_per_s"] = tokens / case.gpus / (clocked(step, parts, device) / case.steps)
    return found


def clocked(step: Any, batches: Sequence[Any], device: torch.device) -> float:
    """Seconds of steps one after the other."""
    began = time.perf_counter()
    for batch in batches:
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def profile(step: Any, batch: Any) -> None:
    """Print where a step's time goes, by kernel."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step(batch)
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=22, max_name_column_width=60))


def lengths_of(case: Case, row: dict[str, Any]) -> list[int]:
    sides = ("chosen", "rejected") if case.pairs else ("answer",)
    return [len(row["prompt"]) + len(row[side]) for side in sides]


def flop_of(config: Any, module: nn.Module, length: int) -> float:
    """Of one sample, forward and backward: 6 a parameter and token, and causal attention's two products."""
    parameters = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters())
    head = module.model.get_output_embeddings()
    lookups = {m.weight.data_ptr(): m.weight.numel() for m in module.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        lookups.pop(head.weight.data_ptr(), None)
    matrices = parameters - sum(lookups.values())
    return 6 * matrices * length + 6 * config.num_hidden_layers * config.hidden_size * length**2


def in_process(name: str, case: Case, side: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The same in a process of its own, so that neither side leaves memory behind; None if it failed."""
    command = [__file__, name, "--side", side, "--case", json.dumps(asdict(case))]
    command += [*(["--tiny"] if options.tiny else []), "--tokenizer", options.tokenizer]
    command += [*(["--hub", options.hub] if options.hub else []), *(["--profile"] if options.profile else [])]
    lines = printed_apart(f"{name} {side}", command, options.seconds, case.gpus if side == "two" else 0)
    if lines is None:
        return None
    if options.profile:
        print("\n".join(lines[:-1]))
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: those on one GPU")
    parser.add_argument("--tiny", action="store_true", help="in small, on a CPU; records nothing")
    parser.add_argument("--hub", help="folder in hub layout with rm-static; default: the Hugging Face hub")
    parser.add_argument("--tokenizer", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--try", dest="tries", action="append", default=[], metavar="KEY=VALUE[,...]", help="ours, with"
    )
    parser.add_argument("--profile", action="store_true", help="print where one step's time goes")
    parser.add_argument("--seconds", type=int, default=140, help="limit of each side")
    parser.add_argument(
        "--side", choices=["plain", "ours", "one", "two"], help="run this side here and print its figures"
    )
    parser.add_argument("--case", help="with --side: the case as JSON")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    if options.side:
        found = run_side(options.cases[0], Case(**json.loads(options.case)), options.side, options)
        print(json.dumps(found))
        return
    print(f"{'case':18}{'side':44}{'mfu':>7}{'tokens/s':>10}{'step s':>8}{'first s':>9}{'GiB':>7}   on {hardware()}")
    for name in options.cases or ON_ONE:
        (compare if CASES[name].gpus == 1 else compare_gpus)(name, options)


def compare(name: str, options: argparse.Namespace) -> None:
    """Both sides of a case, printed; ours is recorded beside the plain way's."""
    case = CASES[name]
    if options.tiny:
        case = small(case)
    if options.tries:
        return show_tries(name, case, "ours", options)
    plain, ours = (in_process(name, case, side, options) for side in ("plain", "ours"))
    show(name, "plain", plain)
    show(name, "ours", ours)
    if plain is None or ours is None:
        raise SystemExit(1)
    ours["speedup"] = ours["tokens_per_s"] / plain["tokens_per_s"]
    print(f"{name:18}{ours['speedup']:.2f} times the plain way", flush=True)
    if not options.tiny:
        for metric, unit in METRICS.items():
            value = plain["tokens_per_s" if metric == "speedup" else metric]
            record("train", name, metric, ours[metric], unit, {"name": "plain way, same run", "value": value})


def compare_gpus(name: str, options: argparse.Namespace) -> None:
    """Several GPUs against one: speed, and the curves of loss and gradient norm."""
    case = CASES[name]
    if options.tiny:
        case = small(case)
    if options.tries:
        return show_tries(name, case, "two", options)
    one, two = (in_process(name, case, side, options) for side in ("one", "two"))
    show(name, f"one GPU, {case.batch_size} samples a step", one)
    show(name, f"{case.gpus} GPUs", two)
    if one is None or two is None:
        raise SystemExit(1)
    best = max(one["tokens_per_s"], one["part_tokens_per_s"])
    two["speedup"] = two["tokens_per_s"] / best
    print(f"one GPU, {case.batch_size // case.gpus} samples a step: {one['part_tokens_per_s']:.0f} tokens/s")
    print(f"{name:18}{two['speedup']:.3f} times the better of one GPU's")
    two["loss_gap"], norm_gap = show_curves(one["curve"], two["curve"])
    print(f"largest relative difference: loss {two['loss_gap']:.1e}, gradient norm {norm_gap:.1e}", flush=True)
    if options.tiny:
        return
    side = {
        "name": f"one GPU, the better of {case.batch_size} and {case.batch_size // case.gpus} samples a step, same run"
    }
    record("train", name, "loss_gap", two["loss_gap"], "relative", None, case.gpus)
    if case.precision == "fp32":
        return
    for metric, unit, value in (
        ("mfu", METRICS["mfu"] + ", each GPU", best / one["tokens_per_s"] * one["mfu"]),
        ("tokens_per_s", "tokens/s", best),
    ):
        record("train", name, metric, two[metric], unit, side | {"value": value}, case.gpus)
    record("train", name, "speedup", two["speedup"], "x", side | {"value": best}, case.gpus)


def show_curves(one: list[list[float]], two: list[list[float]]) -> tuple[float, float]:
    """Print them side by side. Returns: the largest relative difference of a loss, and of a norm."""
    print(f"{'step':>6}{'loss, one':>14}{'several':>14}{'norm, one':>14}{'several':>14}")
    for step, (alone, shared) in enumerate(zip(one, two, strict=True)):
        print(f"{step:6}{alone[0]:14.6f}{shared[0]:14.6f}{alone[1]:14.5f}{shared[1]:14.5f}")
    pairs = list(zip(one, two, strict=True))
    loss, norm = (max(abs(a[part] - b[part]) / abs(a[part]) for a, b in pairs) for part in (0, 1))
    return loss, norm


def show_tries(name: str, case: Case, side: str, options: argparse.Namespace) -> None:
    """One side of a case with each of the changes that `--try` names; nothing is recorded."""
    for text in options.tries:
        changes = {key: yaml.safe_load(value) for key, value in (part.split("=") for part in text.split(","))}
        show(name, f"{side} {text}", in_process(name, replace(case, **changes), side, options))


def small(case: Case) -> Case:
    """What `--tiny` makes of a case."""
    tokens = 512 // case.gpus
    case = replace(case, batch_size=8, plain_micro=4, micro_batch_tokens=tokens, compiled=False, precision="fp32")
    return replace(case, warmup=1, steps=2)


def show(name: str, side: str, found: dict[str, Any] | None) -> None:
    if found is not None:
        print(
            f"{name:18}{side:44}{found['mfu']:7.1%}{found['tokens_per_s']:10.0f}{found['step_s']:8.3f}"
            f"{found['first_s']:9.1f}{found['peak_gib']:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
