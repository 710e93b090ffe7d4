"""A run's config with random weights: what its stages take of a GPU, beside what `rlhf plan` says of them.

    python tests/bench/dry_run.py CONFIG [CONFIG ...] [--set KEY=VALUE ...] [--folder DIR] [--tiny] [--record]

The weights are drawn, in the shapes of the models that the config names (shapes/), the tokenizer is a small one, and
every prompt and answer is as long as the config allows. SFT, the reward models and PPO run by their own worker, each
from the models before it: three optimizer steps each, and two pools. Nothing is downloaded; Prefect and MLflow are left
out. The models of a 7B take 14 GB each, in `--folder` or a temporary one; what no later stage reads is removed, so that
five of them lie there at a time, which are those that PPO reads and writes (four with ppo.ema_decay=null). `--tiny`
replaces every shape, on a CPU, and records nothing.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from data_prep.splits import EVAL_KEYS, KEYS_SCHEMA
from data_prep.tables import table_writer, write_table
from data_prep.tokenise import SCHEMAS
from data_prep.unsupervised import CHUNK_SCHEMA
from infra.gpu import GpuInfrastructure
from infra.shipped import SHIPPED
from tasks import dag, launched, plan
from tasks.base import train_tokenizer
from tasks.config import RunConfig, load
from tasks.shapes import GIB, GPUS
from tasks.stages import RECORDS, Stage, StageRef
from tests.bench.records import hardware, record

SHAPES = Path(__file__).parent / "shapes"
STAGES = ("sft", "reward", "gold", "ppo")
FEW = ("sft.max_steps=3", "reward.max_steps=3", "ppo.steps=2", "sft.eval_rows=8", "reward.eval_rows=8")
"""Gold takes over those of the reward model."""
TINY = (
    *("infrastructure=local-cpu", "data.max_prompt_tokens=8", "data.max_answer_tokens=8"),
    *("sft.batch_size=2", "reward.batch_size=2", "sft.engine.compile_layers=false"),
    *("reward.engine.compile_layers=false", "reward.frozen_layers=0", "reward.layers=null"),
    *("ppo.rollout_batch_size=2", "ppo.batch_size=2", "ppo.micro_batch_size=2"),
)
TEXT = "As many words as a tokenizer needs that will never read one."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of rlhf run")
    parser.add_argument("--folder", type=Path, help="where the models lie while they are needed")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--record", action="store_true", help="append to tests/bench/results/memory.jsonl")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs every stage in small on a CPU")
    print(
        f"{'config':<16}{'stage':<8}{'seconds':>8}{'predicted':>11}{'measured':>10} GiB   on {hardware()}", flush=True
    )
    for path in options.configs:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for name, stage, seconds, predicted, peak in dry_run(path, options.set, Path(folder), options.tiny):
                measured = f"{peak:10.1f}" if peak is not None else f"{'-':>10}"
                print(f"{name:<16}{stage:<8}{seconds:8.0f}{predicted:11.1f}{measured}", flush=True)
                if options.record and peak is not None:
                    baseline = {"name": "rlhf plan", "value": predicted, "source": "predicted"}
                    record("memory", f"{name} {stage}", "peak_gib", peak, "GiB", baseline)


def dry_run(
    path: Path, overrides: list[str], folder: Path, tiny: bool
) -> Iterator[tuple[str, str, float, float, float | None]]:
    """Name, stage, seconds, and GiB as predicted and as measured (None on a CPU), stage by stage."""
    tokenizer = train_tokenizer(iter([TEXT] * 10), 300)
    named = load(path, overrides).models
    models = {"policy": named.policy} | ({"reward": named.reward} if named.reward is not None else {})
    for role, model in models.items():
        draw(str(model), tokenizer, folder / "drawn" / role / "model", tiny)
    drawn = [f"models.{role}={folder / 'drawn' / role / 'model'}" for role in models]
    config = load(path, [*overrides, *FEW, *(TINY if tiny else ()), *drawn, f"workspace={folder}"])
    fits = {fit.stage: fit for fit in plan.will_it_fit(config, GPUS["h100"], plan.gpus_of(config))}
    write_rows(config, len(tokenizer), folder)
    infrastructure = GpuInfrastructure(**SHIPPED[config.infrastructure])
    places = {"base": "drawn/policy", "reward-base": "drawn/reward", "tokenise": "rows", "ptx": "rows"}
    graph = dag.graph(config)
    stages = [name for name in STAGES if name in graph]
    for index, name in enumerate(stages):
        node = graph[name]
        inputs = {role: _made(folder / places.get(key, key)) for role, key in node.inputs.items()}
        stage = Stage(node.stage, folder, node.config, inputs, node.roots)
        directory = folder / name
        (directory / RECORDS).mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        report = launched.run_worker(stage, directory, infrastructure, lambda *told: None, lambda *told: None)
        seconds, predicted = time.monotonic() - begun, fits[name].setting.memory.allocated / GIB
        yield config.name, name, seconds, predicted, report.get("peak_gib")
        needed = {places.get(key, key) for later in stages[index + 1 :] for key in graph[later].inputs.values()}
        for place in {*stages[: index + 1], *places.values()} - needed:  # the disk shall hold no more than it has to
            shutil.rmtree(folder / place, ignore_errors=True)


def draw(model: str, tokenizer: PreTrainedTokenizerBase, out: Path, tiny: bool) -> None:
    """A model folder with random weights in bf16, in the shape that has the model's name. SystemExit without one."""
    name = "tiny" if tiny else Path(model).name.lower()
    shape = next((file for file in SHAPES.glob("*.yaml") if name.startswith(file.stem)), None)
    if shape is None:
        raise SystemExit(f"{SHAPES} has no shape of {model}: add one, with the sizes of its config.json")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**yaml.safe_load(shape.read_text()), **ids)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)
    del network
    torch.cuda.empty_cache()  # this process has no more than CUDA's context while a stage is measured


def write_rows(config: RunConfig, vocabulary: int, folder: Path) -> None:
    """Rows for the steps of each stage, all of them as long as they may be, and the text of PTX."""
    (folder / "rows").mkdir()
    (folder / "split").mkdir()
    write_table([], folder / "split" / EVAL_KEYS, KEYS_SCHEMA)
    batches = {"sft": config.sft.batch_size, "reward": config.reward.batch_size, "ppo": config.ppo.pool_size}
    batches["judge"] = config.gold.batch_size
    prompt, answer = config.data.max_prompt_tokens, config.data.max_answer_tokens
    chunk = config.data.unsupervised.chunk_tokens if config.data.unsupervised is not None else 1
    draw = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(token) for token in draw.integers(2, vocabulary, length)]

    for kind, batch in batches.items():
        np.save(folder / "split" / f"{kind}-keys.npy", np.arange(3, dtype=np.uint64))
        for side, rows in (("train", 3 * batch), ("eval", 8)):
            with table_writer(folder / "rows" / f"{kind}-{side}.arrow", SCHEMAS[kind]) as writer:
                for _ in range(rows):
                    row = {name: ids(answer) for name in ("answer", "chosen", "rejected")}
                    row |= {"prompt": ids(prompt), "others": [], "messages": [], "source": "drawn", "group": "drawn"}
                    writer.append({name: ({**row, "weight": 1.0})[name] for name in SCHEMAS[kind].names})
    with table_writer(folder / "rows" / "ptx-train.arrow", CHUNK_SCHEMA) as writer:
        for _ in range(config.ppo.ptx_batch_size):
            writer.append({"tokens": ids(chunk)})


def _made(folder: Path) -> StageRef:
    """What was put into a folder, as a stage that is finished."""
    return StageRef(folder.name, "0" * 16, "0" * 64, str(folder), cached=False, seconds=0.0, metrics={})


if __name__ == "__main__":
    main()
