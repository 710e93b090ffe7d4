"""The reward model: a scalar head on the answer's last token, trained on preference pairs.

Bradley-Terry loss over pairs (Ouyang et al. 2022, equation 1). Differs from DeepSpeed-Chat, which supervises every
token after the first difference and, where answers differ in length, scores padding: here one score per answer, at its
last token, chosen and rejected in one forward pass. Scores are fp32 and a tie counts as half a hit, since a constant
model would otherwise look perfect.

The gold reward model is another one of these: pairs of its own (the judge's phase), a seed of its own, and PPO never
sees it (the setting of Gao, Schulman & Hilton 2023). What PPO gains by this one alone is what it exploited.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from tasks.training.models import SCORE_MEAN, freeze_first, keep_first, load_scalar
from tasks.training.ranks import gather_rows, world_size
from tasks.training.supervised import eval_share, fit, held_out, steps_of
from tasks.training.types import Engine, PairBatch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate; writes `model/`. Returns the stage's metrics."""
    config, seed = RewardConfig.model_validate(job.config[job.stage]), job.config["seed"]
    tokenizer = load_tokenizer(job.inputs["tokenizer"], job.trusts("base"))
    train = read_table(job.inputs["data"] / f"{job.phase}-train.arrow")
    judged_on = held_out(job, config.eval_rows)
    if job.stage == "gold":
        config = within(config, len(train))
    model = load_scalar(job.inputs["base"], tokenizer.pad_token_id, seed, job.trusts("base"))
    keep_first(model, config.layers, f"{job.stage}.layers")
    steps = steps_of(config, len(train), job.stage)
    if config.lora is not None:
        add_adapters(model.model, config.lora, f"{job.stage}.lora")
    freeze_first(model, config.frozen_layers, f"{job.stage}.frozen_layers")
    where = f"{job.stage}.engine"
    engine = train_engine(model, config.engine, config.optimizer, steps, job.device, where, config.head_learning_rate)

    def collate(rows: Any) -> PairBatch:
        return pair_batch(rows, job.device)

    def loss_of(batch: PairBatch) -> torch.Tensor:
        chosen, rejected = scores(engine, batch)
        return pairwise_loss(chosen, rejected, batch.weight, config.centering_coef, config.margin)

    def weight_of(batch: PairBatch) -> float:
        return float(batch.weight.sum())

    def found() -> dict[str, Any]:
        return evaluate(engine, judged_on, collate, config)

    done = fit(job, config, engine, train, collate, pair_tokens, loss_of, weight_of, found, seed)
    metrics = found()
    job.log(
        done["steps"],
        {f"{job.stage}/eval_{name}": value for name, value in metrics.items() if isinstance(value, float)},
    )
    setattr(engine.module.model.config, SCORE_MEAN, engine.module.score_mean + metrics["chosen_score"])
    export(engine.module, tokenizer, job.directory / "model")
    return {**done, "train_pairs": len(train), **metrics}


def within(config: RewardConfig, rows: int) -> RewardConfig:
    """The config with a batch that the rows fill: no run shall fail because its judge has few pairs."""
    most = rows // world_size() * world_size()
    return config.model_copy(update={"batch_size": min(config.batch_size, most)}) if most else config


@torch.no_grad()
def evaluate(engine: Engine, table: datasets.Dataset, collate: Any, config: RewardConfig) -> dict[str, Any]:
    """Loss, accuracy with ties as half, calibration, and the accuracy of preferring the longer answer."""
    engine.module.eval()
    results = []
    for part, counts in eval_share(table.to_list(), pair_tokens, config.micro_batch_tokens):
        chosen, rejected = scores(engine, collate(part))
        if counts:
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
        "margin": chosen - rejected,
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
    accuracy, gain = mean("hit"), [row["hit"] - row["length_hit"] for row in results]
    # Normal approximations of 95 % intervals, the second of the paired difference of the two accuracies.
    reach = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(results))
    gain_reach = 1.96 * statistics.pstdev(gain) / math.sqrt(len(results))
    low, high = wilson(accuracy, len(results))
    return {
        "accuracy": accuracy,
        "accuracy_interval": reach,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_accuracy": mean("length_hit"),
        "length_gain_interval": gain_reach,
        "beats_length": statistics.fmean(gain) > gain_reach,
        "calibration_error": calibration_error([row["margin"] for row in results]),
        "loss": mean("loss"),
        "chosen_score": mean("chosen"),
        "eval_pairs": len(results),
        "margin_quantiles": quantiles([row["margin"] for row in results]),
        "accuracy_per_source": {name: mean("hit", rows) for name, rows in sorted(per_source.items())},
        "accuracy_interval_per_source": {
            name: wilson(mean("hit", rows), len(rows)) for name, rows in sorted(per_source.items())
        },
        "length_accuracy_per_source": {name: mean("length_hit", rows) for name, rows in sorted(per_source.items())},
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` pairs (Wilson 1927): also right for few pairs and shares near 0 or 1."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = 1.96 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return middle - reach, middle + reach


def calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) of the model's own choices.

    A choice is made with confidence sigmoid(|margin|), between 1/2 and 1, and right where the margin is positive; a
    margin of 0 is half right. Within equal bins of confidence: |share that is right - mean confidence|, weighted.
    """
    groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        groups[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, _preference(margin, 0.0)))
    gaps = [abs(sum(hit - confidence for confidence, hit in group)) for group in groups.values()]
    return sum(gaps) / len(margins)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 5, 25, 50, 75 and 95 % quantiles, interpolated."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return {f"{share:.0%}": float(value) for share, value in zip(QUANTILES, found, strict=True)}
