"""What models keep of what they and those that they come from were trained on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.trained import keep, trained_on
from tasks import worker
from tasks.training.job import Job


def keys(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def job(stage: str, directory: Path, split: Path, **models: Path) -> Job:
    inputs = {"data": directory, "split": split, **models}
    return Job(stage, directory, {}, inputs, torch.device("cpu"), lambda *_: None, lambda *_: None, lambda: False)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    (tmp_path / "split").mkdir()
    for phase, numbers in (("sft", (1, 2)), ("reward", (3,)), ("ppo", (5, 4)), ("judge", (9,))):
        np.save(tmp_path / "split" / f"{phase}-keys.npy", keys(*numbers))
    return tmp_path / "split"


def test_a_policy_keeps_its_data_that_of_its_reward_model_and_of_its_warm_start(tmp_path: Path, split: Path) -> None:
    warm = tmp_path / "warm"
    warm.mkdir()
    keep(warm, [], keys(70, 71))
    made: dict[str, Path] = {}
    for stage, roles in (
        ("sft", {"base": warm}),
        ("reward", {"base": "sft"}),
        ("ppo", {"sft": "sft", "reward": "reward"}),
    ):
        directory = tmp_path / stage
        for name in ("model", *(["ema"] if stage == "ppo" else [])):
            (directory / name).mkdir(parents=True)
        inputs = {role: made.get(str(name), Path(name)) for role, name in roles.items()}
        worker.keep_ancestry(job(stage, directory, split, **inputs))
        made[stage] = directory / "model"
    assert trained_on([made["sft"]]).tolist() == [1, 2, 70, 71]
    assert trained_on([made["reward"]]).tolist() == [1, 2, 3, 70, 71]
    for name in ("model", "ema"):
        assert trained_on([tmp_path / "ppo" / name]).tolist() == [1, 2, 3, 4, 5, 70, 71]


def test_the_gold_reward_model_keeps_the_judges_data(tmp_path: Path, split: Path) -> None:
    (tmp_path / "model").mkdir()
    worker.keep_ancestry(replace(job("gold", tmp_path, split), config={"phase": "judge"}))
    assert trained_on([tmp_path / "model"]).tolist() == [9]


def test_a_model_of_the_hub_keeps_nothing(tmp_path: Path) -> None:
    assert trained_on([tmp_path, tmp_path / "none"]).tolist() == []
