"""The head of a reward model: new where its folder has none, kept where it has one."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tasks.training.models import load_scalar
from tests.tiny import tiny_llama


def test_new_head_is_drawn_by_seed_and_a_trained_one_is_kept(tmp_path: Path) -> None:
    config = tiny_llama(50, num_labels=1, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "policy")
    drawn = [load_scalar(tmp_path / "policy", 0, new_head_seed=seed).model.score.weight for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    trained = LlamaForSequenceClassification(config)
    trained.save_pretrained(tmp_path / "reward")
    kept = load_scalar(tmp_path / "reward", 0, new_head_seed=1).model.score.weight
    assert torch.equal(kept, trained.score.weight.float())
