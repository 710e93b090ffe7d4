"""Sampling answers: a plain loop over transformers' key-value cache, on the policy's own weights.

The loop for what `rollout_slots.py` does not do: ZeRO-3, truncated distributions, families that it does not know.

Differs from transformers' `generate` in what PPO needs: log-probabilities are gathered as tokens are sampled (with the
temperature, without any truncation of the distribution), randomness comes from a generator of its own so that a rollout
can be repeated, and EOS is a sampled token like any other: it is never appended, and what follows it is masked.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tasks.training.batches import positions
from tasks.training.logprobs import token_logprobs
from tasks.training.types import Rollout, Sequences


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequences,
    max_answer_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    all_done: Callable[[bool], bool] = bool,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """Answers of a causal language model for a batch of prompts.

    Args:
        model: a transformers causal language model in eval mode.
        prompts: [B, P], padded on the left.
        max_answer_tokens: limit R of the answers.
        temperature: of sampling; unused when greedy.
        generator: source of randomness, on the model's device; None: the most likely token (greedy).
        all_done: given whether this rank's rows have all ended, says whether every rank's have. Under ZeRO-3 all ranks
            must take the same number of steps, since each step gathers parameters from all.
        top_k, top_p: sample from the likeliest tokens only; 0 and 1: from all.

    Returns: a Rollout whose sequences are prompt and answer, [B, P + R], where R is the longest answer of the batch.
    """
    ended = torch.zeros(len(prompts.input_ids), dtype=torch.bool, device=prompts.input_ids.device)
    mask, token_ids, position_ids = prompts.attention_mask, prompts.input_ids, prompts.position_ids
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    masks: list[Tensor] = []
    cache = None
    for _ in range(max_answer_tokens):
        output = model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1]
        chosen = _choose(logits, temperature, generator, top_k, top_p)
        tokens.append(torch.where(ended, pad_id, chosen))
        logprobs.append(torch.where(ended, 0.0, token_logprobs(logits, chosen, temperature)))
        masks.append(~ended)
        # Padding after EOS is masked for the tokens to come too, so a finished row costs compute but changes nothing.
        mask = torch.cat([mask, ~ended.unsqueeze(1)], dim=1)
        token_ids, position_ids = tokens[-1].unsqueeze(1), position_ids[:, -1:] + 1
        ended = ended | (chosen == eos_id)
        if all_done(bool(ended.all())):
            break
    answer_mask = torch.stack(masks, dim=1)
    attention_mask = torch.cat([prompts.attention_mask, answer_mask], dim=1)
    input_ids = torch.cat([prompts.input_ids, torch.stack(tokens, dim=1)], dim=1)
    return Rollout(
        Sequences(input_ids, attention_mask, positions(attention_mask)),
        answer_mask,
        torch.stack(logprobs, dim=1),
        ended,
    )


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None, top_k: int, top_p: float) -> Tensor:
    if generator is None:
        return logits.argmax(-1)
    probabilities = truncated(torch.softmax(logits.float() / temperature, dim=-1), top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def truncated(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities with 0 for all but the likeliest: `top_k` of them, and as many as have `top_p` together.

    Args: probabilities [B, V]; top_k 0 and top_p 1: all. Returns: [B, V]; the rows no longer sum to 1.
    """
    if 0 < top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, -1).values[:, -1:]
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    if top_p < 1:
        likeliest, order = probabilities.sort(-1, descending=True)
        before = likeliest.cumsum(-1) - likeliest
        total = likeliest.sum(-1, keepdim=True)
        kept = torch.where(before < top_p * total, likeliest, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return probabilities
