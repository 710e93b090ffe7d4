"""The answers that PPO keeps on its way."""

import json
from pathlib import Path

import torch

from tasks.json_lines import cut_back
from tasks.training import samples
from tasks.training.batches import positions
from tasks.training.experience import Scored
from tasks.training.types import Rollout, Sequences


def scored() -> Scored:
    """Prompts of 2 and 1 tokens, answers of 1 and 2."""
    ids = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 1]])
    attention = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    mask = torch.tensor([[True, False], [True, True]])
    logprobs = torch.tensor([[-1.0, 0.0], [-0.5, -0.25]])
    rollout = Rollout(Sequences(ids, attention, positions(attention)), mask, logprobs, mask[:, 1])
    reference = torch.tensor([[-1.5, -9.0], [-1.0, -0.5]])
    return Scored(rollout, logprobs, None, reference, torch.zeros(2, 2), torch.tensor([0.25, -2.0]))


def test_answers_are_kept_with_tokens_score_and_kl(tmp_path: Path) -> None:
    samples.keep(tmp_path, 4, scored())
    rows = [json.loads(line) for line in (tmp_path / samples.SAMPLES).read_text().splitlines()]
    assert rows == [
        {"step": 5, "prompt": [5, 6], "answer": [7], "reward": 0.25, "kl": 0.5},
        {"step": 5, "prompt": [8], "answer": [9, 1], "reward": -2.0, "kl": 0.75},
    ]


def test_a_resumed_run_makes_its_later_answers_again(tmp_path: Path) -> None:
    for step in (0, 1, 2):
        samples.keep(tmp_path, step, scored())
    path = tmp_path / samples.SAMPLES
    with path.open("a") as file:
        file.write('{"step": 1, "pro')
    cut_back(tmp_path / samples.SAMPLES, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1, 2, 2]
    cut_back(tmp_path / "none" / samples.SAMPLES, 2)


def test_the_first_the_last_and_about_twenty_pools_are_kept() -> None:
    for steps in (1, 3, 50, 200):
        kept = [step for step in range(steps) if samples.is_kept(step, steps)]
        assert (kept[0], kept[-1]) == (0, steps - 1)
        assert len(kept) <= 26
    assert [step for step in range(3) if samples.is_kept(step, 3)] == [0, 1, 2]
