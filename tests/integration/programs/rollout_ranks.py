"""Answers of the slot engine on each rank's own device, before and after optimizer steps, against the plain loop's.

Run once per rank. Writes result.json from the first rank: for each rollout of each rank, whether greedy answers are the
same, and how far log-probabilities are apart at most.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.config import EngineConfig, OptimizerConfig, PPOConfig
from tasks.training.batches import left_padded
from tasks.training.engine import start, train_engine
from tasks.training.experience import slot_engine
from tasks.training.models import Policy
from tasks.training.ranks import gather_rows, rank
from tasks.training.rollout import generate
from tasks.training.rollout_slots import Request, Sampling

EOS, PAD, TOKENS, ROLLOUTS = 1, 0, 16, 3
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("stage", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    device = start(options.device)
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(LlamaConfig(vocab_size=200, initializer_range=0.2, **SHAPE)))
    config = EngineConfig(
        zero_stage=options.stage,
        precision="fp32",  # greedy answers of two ways are the same only where no two logits round to one number
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 100}} if options.stage == 3 else {},
    )
    trained = train_engine(policy, config, OptimizerConfig(learning_rate=1e-2), ROLLOUTS, device, "engine")
    prompts = [[3 + 7 * rank() + number, *range(20, 20 + number)] for number in range(1, 9)]
    rows = left_padded(prompts, PAD, device)
    how = PPOConfig(rollout={"engine": "slots", "gather": options.stage == 3})
    slots = slot_engine(how, trained, len(prompts), (rows.input_ids.shape[1], TOKENS))
    assert slots is not None
    found = []
    for _ in range(ROLLOUTS):
        policy.eval()
        plain = generate(policy.model, rows, TOKENS, EOS, PAD)
        sampling = Sampling(TOKENS, eos_id=EOS, greedy=True)
        made = slots.generate(Request(rows.input_ids, rows.attention_mask), sampling).rollout()
        same = torch.equal(made.sequences.input_ids, plain.sequences.input_ids)
        gap = float((made.logprobs - plain.logprobs).abs().max()) if same else None
        found.append({"rank": rank(), "device": str(made.logprobs.device), "same": same, "gap": gap})
        policy.train()
        begin = rows.input_ids.shape[1]

        def loss_of(sequences, begin=begin):
            return -trained(sequences, begin).logprobs.sum()

        trained.optimizer_step([plain.sequences], loss_of, float(plain.answer_mask.sum()))
    everyone = gather_rows(found)
    if rank() == 0:
        (options.out / "result.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    main()
