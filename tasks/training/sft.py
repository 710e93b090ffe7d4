"""Supervised fine-tuning: the base model learns to answer, cross-entropy over the answers' tokens (EOS included).

Ouyang et al. 2022, section 3.5 (step 1). Differs: the loss is a token mean over the whole optimizer batch, one pass
over the data by default (their 16 overfit after one), dropout is off.
"""

import math
from collections import defaultdict
from typing import Any

import datasets
import torch

from data_prep.tables import read_table
from data_prep.tokenizer import load_tokenizer
from tasks.config import SFTConfig
from tasks.training.batches import language_batch, language_tokens, learnt_places
from tasks.training.engine import export, train_engine
from tasks.training.job import Job
from tasks.training.lora import add_adapters
from tasks.training.models import load_policy
from tasks.training.ranks import gather_rows
from tasks.training.supervised import eval_share, fit, held_out, steps_of
from tasks.training.types import Engine, LanguageBatch


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate; writes `model/`. Returns the stage's metrics."""
    config, seed = SFTConfig.model_validate(job.config["sft"]), job.config["seed"]
    tokenizer = load_tokenizer(job.inputs["tokenizer"], job.trusts("base"))
    train = read_table(job.inputs["data"] / "sft-train.arrow")
    judged_on = held_out(job, config.eval_rows)
    model = load_policy(job.inputs["base"], job.trusts("base"))
    steps = steps_of(config, len(train), "sft")
    if config.lora is not None:
        add_adapters(model.model, config.lora, "sft.lora")
    engine = train_engine(model, config.engine, config.optimizer, steps, job.device, "sft.engine")

    def collate(rows: Any) -> LanguageBatch:
        return language_batch(rows, job.device, config.prompt_loss)

    def loss_of(batch: LanguageBatch) -> torch.Tensor:
        return -engine(batch.row, batch.learnt).logprobs.sum()

    def weight_of(batch: LanguageBatch) -> float:
        return float(len(batch.learnt))

    def found() -> dict[str, Any]:
        return evaluate(engine, judged_on, job.device, config)

    done = fit(job, config, engine, train, collate, language_tokens, loss_of, weight_of, found, seed)
    metrics = found()
    job.log(done["steps"], {f"sft/eval_{name}": value for name, value in metrics.items() if isinstance(value, float)})
    export(engine.module, tokenizer, job.directory / "model")
    return {**done, "train_rows": len(train), **metrics}


@torch.no_grad()
def evaluate(engine: Engine, table: datasets.Dataset, device: torch.device, config: SFTConfig) -> dict[str, Any]:
    """Loss in nats per answer token and perplexity over held-out rows, whole and per source."""
    engine.module.eval()
    sums = []
    for part, counts in eval_share(table.to_list(), language_tokens, config.micro_batch_tokens):
        batch = language_batch(part, device)
        logprobs = engine(batch.row, batch.learnt).logprobs.split([len(learnt_places(row)) for row in part])
        sums += [
            {"source": row["source"], "nll": -float(answer.sum()), "tokens": len(answer)}
            for row, answer in zip(part, logprobs, strict=True)
            if counts
        ]
    engine.module.train()
    return _summary(gather_rows(sums))


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    per_source: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        per_source[row["source"]][0] += row["nll"]
        per_source[row["source"]][1] += row["tokens"]
    nll, tokens = (sum(column) for column in zip(*per_source.values(), strict=True))
    return {
        "loss": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "eval_rows": len(rows),
        "perplexity_per_source": {name: math.exp(n / t) for name, (n, t) in sorted(per_source.items())},
    }
