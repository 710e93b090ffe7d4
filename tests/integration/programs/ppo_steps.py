"""Some pools of PPO on given answers, the same on any number of ranks. Run once per rank.

Which answers a policy samples depends on the rank that samples them. Here an answer is a function of its prompt, so
that two ranks with half of the rows each have the rollout of one with all of them, and each number of PPO has to be the
same: advantages after whitening, the adapted KL coefficient, losses, gradient norms.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from tasks.config import EngineConfig, PPOConfig
from tasks.training import ppo
from tasks.training.batches import positions
from tasks.training.engine import start
from tasks.training.job import Job
from tasks.training.ranks import gather_rows, rank, world_size
from tasks.training.types import Rollout, Sequences
from tests.bench import ppo as bench

POOLS = 3
NAMES = (
    "ppo/reward",
    "ppo/kl",
    "ppo/kl_coef",
    "ppo/policy_loss",
    "ppo/value_loss",
    "ppo/approx_kl",
    "ppo/policy_grad_norm",
    "ppo/critic_grad_norm",
    "ppo/explained_variance",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of result.json, written by the first rank")
    parser.add_argument("stage", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--full", action="store_true", help="the bench's shapes, not tiny ones")
    options = parser.parse_args(argv)
    device = start(options.device)
    size = replace(bench.FULL if options.full else bench.TINY, precision=options.precision)
    config = config_of(options)
    torch.manual_seed(0)
    networks = bench.networks_of(size, config, device, slots=None, learning_rate=1e-5 if options.full else 1e-3)
    networks = networks._replace(slots=GivenAnswers(networks.policy, size))  # type: ignore[arg-type]
    prompts = [ids[: 1 + number % len(ids)] for number, ids in enumerate(bench.prompts_of(size, options.rows))]
    data: Any = ppo.Data([{"prompt": ids} for ids in prompts], None)  # type: ignore[arg-type]
    never = (lambda *_: None, lambda *_: None, lambda: False)
    place = Path(tempfile.mkdtemp())
    job = Job("ppo", place, {"seed": 0, "max_answer_tokens": size.answer}, {}, device, *never)
    state, result = ppo.State(config.kl_coef), []
    whitened = advantages(ppo.make_pool(job, config, networks, data, ppo.State(config.kl_coef), 0)[0])
    for number in range(POOLS):
        metrics = ppo.train_on_pool(job, config, networks, None, data, state, number)
        result.append({name: metrics[name] for name in NAMES} | {"ppo/next_kl_coef": state.kl_coef})
    if rank() == 0:
        found = {"ranks": world_size(), "pools": result, "advantages": whitened}
        (options.out / "result.json").write_text(json.dumps(found))


def config_of(options: argparse.Namespace) -> PPOConfig:
    """A pool is one optimizer batch, so that which rows come together does not depend on the ranks."""
    engine = EngineConfig(zero_stage=options.stage, precision=options.precision)
    return PPOConfig(
        steps=POOLS,
        rollout_batch_size=options.rows,
        batch_size=options.rows,
        micro_batch_size=options.rows // 4,
        epochs=options.epochs,
        ema_decay=None,
        kl_target=0.1,
        kl_horizon=200,
        normalise_rewards=True,
        **{f"{name}_engine": engine for name in ("policy", "critic", "reference", "reward")},
    )


class GivenAnswers:
    """In the place of the slots: answers that are a function of the prompt, with the policy's own log-probabilities."""

    def __init__(self, policy: Any, size: bench.Size) -> None:
        self.policy, self.size = policy, size

    def generate(self, request: Any, sampling: Any) -> "GivenAnswers":
        answers = [self.answer(row[mask].tolist()) for row, mask in zip(*self.prompts(request), strict=True)]
        width, device = max(map(len, answers)), request.prompt_ids.device
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in answers], device=device)
        mask = torch.tensor([[place < len(ids) for place in range(width)] for ids in answers], device=device)
        whole = torch.cat([request.prompt_attention_mask.bool(), mask], 1)
        sequences = Sequences(torch.cat([request.prompt_ids, padded], 1), whole, positions(whole))
        with torch.no_grad():
            logprobs = self.policy(sequences, request.prompt_ids.shape[1], sampling.temperature).logprobs
        ended = torch.tensor([len(ids) < self.size.answer for ids in answers], device=device)
        self.made = Rollout(sequences, mask, torch.where(mask, logprobs, 0.0), ended)
        return self

    def prompts(self, request: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return request.prompt_ids, request.prompt_attention_mask.bool()

    def answer(self, prompt: list[int]) -> list[int]:
        draw = random.Random(str(prompt))
        length = draw.randint(1, self.size.answer)
        return [draw.randrange(5, self.size.policy.vocab_size) for _ in range(length)]

    def rollout(self) -> Rollout:
        return self.made

    def shutdown(self) -> None:
        pass


def advantages(experience: Any) -> list[list[float]]:
    """The advantages of all ranks' rows, in rank order, which is that of the prompts."""
    rows = zip(experience.advantages, experience.answer_mask, strict=True)
    return [row["advantages"] for row in gather_rows([{"advantages": row[mask].tolist()} for row, mask in rows])]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """The largest relative difference of each number of two results; of the whitened advantages, absolute."""
    found = {
        name: max(
            abs(a[name] - b[name]) / max(abs(a[name]), 1e-3) for a, b in zip(one["pools"], other["pools"], strict=True)
        )
        for name in one["pools"][0]
    }
    rows = zip(one["advantages"], other["advantages"], strict=True)
    gap = max(abs(a - b) for own, theirs in rows for a, b in zip(own, theirs, strict=True))
    return found | {"advantages": gap}


if __name__ == "__main__":
    main()
