"""Answers that PPO keeps along its way, so that what it must not see, the gold reward model, can score them later.

`samples.jsonl`: of about 20 pools from the first to the last, up to 64 answers of the first rank, each with its tokens,
the reward model's score and its KL to the reference. Loads no torch: the flow's process shows the file as it grows
(`tasks.answers`).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.training.experience import Scored

SAMPLES = "samples.jsonl"
POOLS = 20
ANSWERS = 64


def is_kept(step: int, steps: int) -> bool:
    """Whether a pool's answers are kept; `step` counts from 0."""
    return step % max(1, steps // POOLS) == 0 or step == steps - 1


def keep(directory: Path, step: int, scored: "Scored") -> None:
    """Append the answers of the first rank's rollout."""
    sequences, mask, start = scored.rollout.sequences, scored.rollout.answer_mask, scored.rollout.start
    answers = scored.rollout.answers()
    kl = (scored.logprobs - scored.reference).where(mask, 0.0).sum(1).tolist()
    with (directory / SAMPLES).open("a", encoding="utf-8") as file:
        for place, score in enumerate(scored.scores[:ANSWERS].tolist()):
            prompt = sequences.input_ids[place, :start][sequences.attention_mask[place, :start]].tolist()
            row = {"step": step + 1, "prompt": prompt, "answer": answers[place], "reward": score, "kl": kl[place]}
            file.write(json.dumps(row) + "\n")
