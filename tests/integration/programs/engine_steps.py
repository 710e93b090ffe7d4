"""Three optimizer steps of a tiny Llama; stage -1 is plain torch. Run by tests, once per rank."""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.config import EngineConfig, LoraConfig, OptimizerConfig
from tasks.training import checkpoint, engine
from tasks.training.batches import language_batch, language_tokens, optimizer_batch
from tasks.training.lora import Base, add_adapters
from tasks.training.models import Policy, load_policy
from tasks.training.ranks import all_sum, barrier, rank
from tasks.training.supervised import own_share

STEPS = 3
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=0.5)
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("stage", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--until", type=int, default=STEPS)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **SHAPE)))
    draw = torch.Generator().manual_seed(1)
    rows = [
        {"prompt": torch.randint(50, (3,), generator=draw).tolist(), "answer": torch.randint(50, (2 + n % 5,)).tolist()}
        for n in range(24)
    ]
    result = plain_torch(policy, rows) if arguments.stage < 0 else with_deepspeed(policy, rows, arguments)
    if rank() == 0:
        (arguments.out / "result.json").write_text(json.dumps(result))


def with_deepspeed(policy: Policy, rows: list, arguments: argparse.Namespace) -> dict:
    device = engine.start(arguments.device)
    config = EngineConfig(
        zero_stage=arguments.stage,
        precision=arguments.precision,
        compile_layers=arguments.compiled,
        gradient_checkpointing=arguments.checkpointing,
        # Smaller ones would stay whole under ZeRO-3, and here all are small.
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 100}} if arguments.stage == 3 else {},
    )
    if arguments.lora:
        before = read(policy.to(device), language_batch(rows, device)).detach()
        add_adapters(policy.model, LoraConfig(rank=2), "lora")
    trained = engine.train_engine(policy, config, OPTIMIZER, STEPS, device, "engine")
    resumed = checkpoint.load(arguments.out / "checkpoints", {"model": trained})
    first = resumed[0] if resumed else 0
    losses, norms = [], []
    for step in range(first, arguments.until):
        batch = [rows[index] for index in optimizer_batch(step, len(rows), 8, seed=0)]
        batches = [language_batch(part, device) for part in own_share(batch, language_tokens, arguments.tokens)]
        sums: list[torch.Tensor] = []

        def loss_of(batch, sums=sums):
            sums.append(-read(trained, batch).sum())
            return sums[-1]

        tokens = sum(len(batch.learnt) for batch in batches)
        norms.append(trained.optimizer_step(batches, loss_of, tokens).grad_norm)
        total = all_sum(torch.tensor([float(sum(s.detach() for s in sums)), float(tokens)], device=device))
        losses.append(float(total[0] / total[1]))
    if arguments.until < STEPS:
        checkpoint.save(arguments.out / "checkpoints", arguments.until, {"model": trained}, {})
        return {}
    state = weights(trained, arguments.stage)
    result = {"losses": losses, "norms": norms, "first_step": first, "weights": state}
    return result | (adapters(trained, rows, before, arguments.out / "model") if arguments.lora else {})


@torch.no_grad()
def adapters(trained: engine.TrainEngine, rows: list, before: torch.Tensor, folder: Path) -> dict:
    """How far the base is from what it was, and the merged export from the adapted network; and what was kept."""
    batch = language_batch(rows, trained.device)
    adapted, base = read(trained, batch), read(Base(trained), batch)
    engine.export(trained.module, NoTokenizer(), folder)
    barrier()
    merged = read(load_policy(folder).to(trained.device), batch)
    return {
        "base_gap": float((base - before).abs().max()),
        "adapted_gap": float((adapted - before).abs().max()),
        "merged_gap": float((merged - adapted).abs().max()),
    }


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        pass


def weights(trained: engine.TrainEngine, stage: int) -> list[list[float]]:
    """Every parameter, whole, as exact numbers."""
    import deepspeed

    whole = []
    for parameter in trained.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            whole.append(parameter.detach().double().flatten().tolist())
    return whole


def plain_torch(policy: Policy, rows: list) -> dict:
    decayed = [p for p in policy.parameters() if p.ndim >= 2]
    others = [p for p in policy.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item())
    )
    losses, norms = [], []
    for step in range(STEPS):
        mean = one_by_one(policy, [rows[index] for index in optimizer_batch(step, len(rows), 8, seed=0)])
        mean.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)))
        adam.step()
        schedule.step()
        adam.zero_grad()
        losses.append(float(mean.detach()))
    return {"losses": losses, "norms": norms}


def read(model, batch) -> torch.Tensor:
    """Log-probabilities of the learnt tokens."""
    return model(batch.row, batch.learnt).logprobs


def one_by_one(policy: Policy, batch: list) -> torch.Tensor:
    """Cross-entropy by transformers' own logits, a sample at a time."""
    total, tokens = torch.zeros(()), 0
    for row in batch:
        ids = torch.tensor([row["prompt"] + row["answer"]])
        logits = policy.model(ids).logits[0, len(row["prompt"]) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row["answer"]), reduction="sum")
        tokens += len(row["answer"])
    return total / tokens


if __name__ == "__main__":
    main()
