"""The run configs that the repo ships: each is read, and those for a GPU fit the GPU that they name."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks import dag, plan
from tasks.config import load
from tasks.shapes import GPUS

ROOT = Path(__file__).parents[3]
RUNS = sorted((ROOT / "infra" / "runs").glob("*.yaml"))
SHAPES = ROOT / "tests" / "bench" / "shapes"
OPT_350M, OPT_1B, LLAMA_7B, SMOLLM2 = (
    yaml.safe_load((SHAPES / f"{name}.yaml").read_text())
    for name in ("opt-350m", "opt-1.3b", "llama-2-7b", "smollm2-135m")
)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_config_is_read_and_has_its_stages(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem.replace(".", "-")
    assert {"sft", "reward", "gold", "ppo", "evaluate"} <= set(dag.graph(config))


@pytest.mark.parametrize(
    ("run", "gpu", "models", "settings"),
    [
        ("smollm2-135m", "a6000", {"policy": SMOLLM2}, ()),
        ("smollm2-135m", "l4", {"policy": SMOLLM2}, ("ppo.micro_batch_size=16",)),
        ("opt-1.3b", "h100", {"policy": OPT_1B, "reward": OPT_350M}, ()),
        ("llama-7b", "a100", {"policy": LLAMA_7B}, ()),
    ],
)
def test_it_fits_its_gpu_by_prediction(
    tmp_path: Path, run: str, gpu: str, models: dict[str, dict[str, Any]], settings: tuple[str, ...]
) -> None:
    changes = list(settings)
    for role, shape in models.items():
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps(shape))
        changes.append(f"models.{role}={tmp_path / role}")
    config = load(ROOT / "infra" / "runs" / f"{run}.yaml", changes)
    plan.check_lengths(config)
    fits = plan.will_it_fit(config, GPUS[gpu], plan.gpus_of(config))
    assert {fit.stage: fit.fits for fit in fits} == dict.fromkeys(("sft", "reward", "gold", "ppo"), True), [
        (fit.stage, fit.setting.memory.needed / 2**30) for fit in fits
    ]
