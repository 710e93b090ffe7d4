"""The reward model: a scalar head on the answer's last token, trained on preference pairs.

Bradley-Terry loss over pairs (Ouyang et al. 2022, equation 1). Differs from DeepSpeed-Chat, which supervises every
token after the first difference and, where answers differ in length, scores padding: here one score per answer, at its
last token, chosen and rejected in one forward pass. Scores are fp32 and a tie counts as half a hit, since a constant
model would otherwise look perfect.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import datasets
import torch

from data_prep.tables import read_table
from data_prep.tokenizer import load_tokenizer
from tasks.config import RewardConfig
from tasks.training.batches import pair_batch, pair_tokens
from tasks.training.engine import export, train_engine
from tasks.training.job import Job
from tasks.training.lora import add_adapters
from tasks.training.losses import pairwise_loss
from tasks.training.models import SCORE_MEAN, load_scalar
from tasks.training.ranks import gather_rows
from tasks.training.supervised import fit, own_share, steps_of
from tasks.training.types import Engine, PairBatch


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate; writes `model/`. Returns the stage's metrics."""
    config, seed = RewardConfig.model_validate(job.config["reward"]), job.config["seed"]
    tokenizer = load_tokenizer(job.inputs["tokenizer"])
    train = read_table(job.inputs["data"] / "reward-train.arrow")
    held_out = read_table(job.inputs["data"] / "reward-eval.arrow")
    model = load_scalar(job.inputs["base"], tokenizer.pad_token_id, new_head_seed=seed)
    steps = steps_of(config, len(train), "reward")
    if config.lora is not None:
        add_adapters(model.model, config.lora, "reward.lora")
    engine = train_engine(model, config.engine, config.optimizer, steps, job.device, "reward.engine")

    def collate(rows: Any) -> PairBatch:
        return pair_batch(rows, job.device)

    def loss_of(batch: PairBatch) -> torch.Tensor:
        chosen, rejected = scores(engine, batch)
        return pairwise_loss(chosen, rejected, batch.weight, config.centering_coef)

    fit(job, config, engine, train, collate, pair_tokens, loss_of, lambda batch: batch.weight.sum(), seed)
    metrics = evaluate(engine, held_out.select(range(min(config.eval_rows, len(held_out)))), collate, config)
    job.log(steps, {f"reward/eval_{name}": value for name, value in metrics.items() if isinstance(value, float)})
    setattr(engine.module.model.config, SCORE_MEAN, metrics["chosen_score"])
    export(engine.module, tokenizer, job.directory / "model")
    return {"steps": steps, "train_pairs": len(train), **metrics}


@torch.no_grad()
def evaluate(engine: Engine, table: datasets.Dataset, collate: Any, config: RewardConfig) -> dict[str, Any]:
    """Loss, accuracy with ties as half, and the accuracy of preferring the longer answer, whole and per source."""
    engine.module.eval()
    results = []
    for part in own_share(table.to_list(), pair_tokens, config.micro_batch_tokens):
        chosen, rejected = scores(engine, collate(part))
        results += [_result(row, float(c), float(r)) for row, c, r in zip(part, chosen, rejected, strict=True)]
    engine.module.train()
    return _summary(gather_rows(results))


def scores(engine: Engine, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected answers, [S / 2] fp32 each, from one forward pass."""
    chosen, rejected = engine(batch.row)[0, batch.last].chunk(2)
    return chosen, rejected


def _result(row: Mapping[str, Any], chosen: float, rejected: float) -> dict[str, Any]:
    return {
        "source": row["source"],
        "chosen": chosen,
        "loss": math.log1p(math.exp(-abs(chosen - rejected))) + max(rejected - chosen, 0.0),
        "hit": _preference(chosen, rejected),
        "length_hit": _preference(len(row["chosen"]), len(row["rejected"])),
    }


def _preference(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str, rows: list[dict[str, Any]] = results) -> float:
        return sum(row[key] for row in rows) / len(rows)

    per_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results:
        per_source[row["source"]].append(row)
    accuracy = mean("hit")
    return {
        "accuracy": accuracy,
        # Normal approximation of the binomial's 95 % interval.
        "accuracy_interval": 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(results)),
        "length_accuracy": mean("length_hit"),
        # Of the paired difference of the two accuracies.
        "length_gain_interval": 1.96
        * statistics.pstdev(row["hit"] - row["length_hit"] for row in results)
        / math.sqrt(len(results)),
        "loss": mean("loss"),
        "chosen_score": mean("chosen"),
        "eval_pairs": len(results),
        "accuracy_per_source": {name: mean("hit", rows) for name, rows in sorted(per_source.items())},
    }
