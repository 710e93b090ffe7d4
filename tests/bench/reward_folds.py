"""Settings of the reward model on folds of its train pairs, so that no setting is chosen by a set's test rows.

    python tests/bench/reward_folds.py WORKSPACE [--try "KEY=VALUE ..."]... [--folds 5] [--only 0,1] [--record]

WORKSPACE has a trained reward model; its newest one's config, base model and pairs are taken. The train pairs are dealt
into folds by the group that the split gave them, each is left out of training and then judged, and the folds are put
together. `--try` lays keys of the section `reward` over that config ("layers=20 optimizer.learning_rate=1.0e-4");
none is the config as it is. The standard error beside an accuracy is that of its pairs alone. Training's own is not in
it: on a GPU, where sums come in any order, the same setting and seed may differ by a point, which `deterministic=true`
rules out and `seed=N` shows.
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from data_prep.tables import iter_rows, read_table, write_table
from data_prep.tokenise import SCHEMAS
from data_prep.tokenizer import load_tokenizer, prompt_ids
from tasks.config import overlaid
from tasks.training import reward
from tasks.training.job import Job
from tasks.worker import add_in_one_order, model_inputs
from tests.bench.process import start_here
from tests.bench.records import hardware, record
from tests.bench.reward_accuracy import manifests

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--try", action="append", dest="tries", metavar="KEY=VALUE ...", help="a setting; again: more")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", help="these folds alone, such as 0,1")
    parser.add_argument("--record", action="store_true", help="append to tests/bench/results/reward.jsonl")
    options = parser.parse_args()
    device = start_here("cuda" if torch.cuda.is_available() else "cpu")
    spec = newest(options.workspace)
    chosen = [int(fold) for fold in options.only.split(",")] if options.only else list(range(options.folds))
    if options.folds < 2 or not set(chosen) <= set(range(options.folds)):
        parser.error(f"--folds has to be 2 or more, and --only of 0 to {options.folds - 1}")
    try:
        settings = {setting: with_setting(spec["config"], setting) for setting in options.tries or [""]}
    except ValueError as error:
        parser.error(str(error))
    dealt = folds_of(spec, options.folds)
    print(f"{sum(map(len, dealt))} pairs in folds of {', '.join(str(len(fold)) for fold in dealt)}, on {hardware()}")
    for setting, config in settings.items():
        with tempfile.TemporaryDirectory() as folder:
            found = [judged(spec, config, dealt, fold, Path(folder), device) for fold in chosen]
        pairs = sum(result["eval_pairs"] for result in found)
        accuracy, loss = (sum(r[key] * r["eval_pairs"] for r in found) / pairs for key in ("accuracy", "loss"))
        error = math.sqrt(accuracy * (1 - accuracy) / pairs)
        print(
            f"{setting or 'as it is'}\n  {accuracy:.2%} of {pairs} pairs (+- {error:.2%}), loss {loss:.4f}", flush=True
        )
        for source, (hits, rows) in sorted(per_source(found, dealt, chosen).items()):
            print(f"  {source:<42}{hits / rows:7.2%} of {rows}", flush=True)
        if options.record:
            beside = {"name": "loss", "value": loss}
            case = f"folds {chosen} of {options.folds}, {sum(map(len, dealt))} pairs, {setting or 'as it is'}"
            record("reward", case, "accuracy", accuracy, "of pairs", beside)


def newest(workspace: Path) -> dict[str, Any]:
    """What the worker was told of the newest reward model, `config` and `inputs`. SystemExit without one."""
    made = manifests(workspace, "reward")
    if not made:
        raise SystemExit(f"{workspace} has no finished reward model: run `rlhf run CONFIG --until reward` first")
    spec: dict[str, Any] = json.loads((made[-1].parent / "records" / "config.json").read_text())
    return spec


def folds_of(spec: Mapping[str, Any], folds: int) -> list[list[Row]]:
    """The train pairs of a reward model, dealt by the hash of their group: what is about one prompt stays together."""
    inputs = model_inputs(spec["inputs"])
    tokenizer = load_tokenizer(inputs["tokenizer"])
    rows = iter_rows(inputs["split"] / "reward-train.arrow", ["prompt", "group"])
    groups = {tuple(prompt_ids(tokenizer, row["prompt"])): row["group"] for row in rows}
    dealt: list[list[Row]] = [[] for _ in range(folds)]
    for row in read_table(inputs["data"] / "reward-train.arrow").to_list():
        digest = hashlib.sha256(groups[tuple(row["prompt"])].encode()).digest()
        dealt[int.from_bytes(digest[:8], "big") % folds].append(row)
    return dealt


def with_setting(stage: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """The stage's config with "KEY=VALUE ..." laid over its section `reward`.

    Raises ValueError for what no config could hold, and for choosing a model by the pairs that shall judge it.
    """
    tree = {"reward": {**deepcopy(stage["reward"]), "seed": stage["seed"]}}
    reward_config = overlaid(tree, [f"reward.{key}" for key in setting.split()]).reward
    if reward_config.keep_best or reward_config.patience is not None:
        raise ValueError("keep_best and patience choose by the fold that is judged; set them to false and null")
    section = reward_config.model_dump(mode="json")
    return {**stage, "reward": section, "seed": section.pop("seed")}


def judged(
    spec: Mapping[str, Any],
    config: Mapping[str, Any],
    dealt: Sequence[Sequence[Row]],
    fold: int,
    folder: Path,
    device: torch.device,
) -> dict[str, Any]:
    """The stage's metrics where it is trained on all folds but one, and judged on that."""
    directory = folder / str(fold)
    (directory / "data").mkdir(parents=True)
    train = [row for index, rows in enumerate(dealt) if index != fold for row in rows]
    for side, rows in (("train", train), ("eval", dealt[fold])):
        write_table(rows, directory / "data" / f"reward-{side}.arrow", SCHEMAS["reward"])
    if config["reward"]["deterministic"]:
        add_in_one_order()
    job = Job(
        stage="reward",
        directory=directory,
        config={**config, "reward": {**config["reward"], "eval_rows": len(dealt[fold])}},
        inputs={**model_inputs(spec["inputs"]), "data": directory / "data"},
        device=device,
        log=lambda step, metrics: None,
        progress=lambda step, total, metrics: None,
        should_stop=lambda: False,
    )
    return reward.run(job)


def per_source(
    found: Sequence[Mapping[str, Any]], dealt: Sequence[Sequence[Row]], chosen: Sequence[int]
) -> dict[str, tuple[float, int]]:
    """Source -> its pairs that were judged right, and its pairs."""
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for result, fold in zip(found, chosen, strict=True):
        for source, accuracy in result["accuracy_per_source"].items():
            rows = sum(row["source"] == source for row in dealt[fold])
            hits, total = sums[source]
            sums[source] = hits + accuracy * rows, total + rows
    return dict(sums)


if __name__ == "__main__":
    main()
