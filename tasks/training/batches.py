"""Rows of token ids -> packed or padded tensors, and the order in which rows are trained on.

The order is a function of seed and step alone, so a resumed run needs no more than its step to know what comes next.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from tasks.training.packing import on_device, packed
from tasks.training.ranks import rank, world_size
from tasks.training.types import LanguageBatch, PairBatch, Sequences

Row = TypeVar("Row")


def optimizer_batch(step: int, rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of the optimizer batch at a step; every pass over the rows is shuffled anew.

    The last rows of a pass that do not fill a batch are left out of that pass.

    Args:
        step: optimizer step, from 0.
        rows: number of rows, at least batch_size.
        batch_size: rows of the whole optimizer batch, over all ranks.
    """
    per_epoch = rows // batch_size
    assert per_epoch, f"{rows} rows make no batch of {batch_size}"
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[index * batch_size : (index + 1) * batch_size].tolist()


def batch_indices(step: int, rows: int, batch_size: int, seed: int) -> list[int]:
    """This rank's equal share of `optimizer_batch`, whose size is a multiple of the number of ranks."""
    share = batch_size // world_size()
    return optimizer_batch(step, rows, batch_size, seed)[rank() * share : (rank() + 1) * share]


def check_batch(batch_size: int, rows: int, key: str) -> None:
    """ValueError with the mend if `rows` make no batch, or the batch cannot be shared by all ranks.

    `key` is where the config sets the batch size.
    """
    if rows < batch_size:
        raise ValueError(f"{key} is {batch_size}, but there are only {rows} rows; lower it or add data")
    if batch_size % world_size():
        raise ValueError(f"{key} {batch_size} is no multiple of the {world_size()} processes")


def chunks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Successive runs of at most `size` rows."""
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def language_batch(rows: Sequence[Mapping[str, Any]], device: torch.device, prompt_loss: bool = False) -> LanguageBatch:
    """Rows with `prompt` and `answer` token ids -> one packed row; its answers are learnt, or all of its tokens."""
    begins = accumulate(map(language_tokens, rows), initial=0)
    learnt = [
        begin + place
        for begin, row in zip(begins, rows, strict=False)  # the last one begins no row
        for place in (range(1, language_tokens(row)) if prompt_loss else learnt_places(row))
    ]
    row = packed([row["prompt"] + row["answer"] for row in rows], device)
    return LanguageBatch(row, on_device(torch.tensor(learnt), device))


def learnt_places(row: Mapping[str, Any]) -> list[int]:
    """The places in prompt + answer that SFT learns: the answer's, but for the spans in `others`, if there are any.

    An SFT-only row is a whole conversation, whose answer holds turns of the user as well. Nothing comes before place 0,
    by which it could be predicted.
    """
    start = len(row["prompt"])
    others = {place for span in row.get("others") or () for place in range(span["begin"], span["end"])}
    return [start + place for place in range(len(row["answer"])) if place not in others and start + place > 0]


def language_tokens(row: Mapping[str, Any]) -> int:
    """Tokens that a row takes in `language_batch`."""
    return len(row["prompt"]) + len(row["answer"])


def pair_batch(rows: Sequence[Mapping[str, Any]], device: torch.device) -> PairBatch:
    """Rows with `prompt`, `chosen` and `rejected` token ids -> chosen and rejected answers in one packed row."""
    row = packed([row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows], device)
    weight = on_device(torch.tensor([row["weight"] for row in rows], dtype=torch.float32), device)
    return PairBatch(row, row.cu_seqlens[1:].long() - 1, weight)


def pair_tokens(row: Mapping[str, Any]) -> int:
    """Tokens that a row takes in `pair_batch`."""
    return 2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"])


def right_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Sequences:
    """Token ids -> [B, T], padding after the tokens."""
    return _padded(rows, pad_id, device, left=False)


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Sequences:
    """Token ids -> [B, T], padding before the tokens, as generation needs it."""
    return _padded(rows, pad_id, device, left=True)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count the real tokens from 0 on either side of the padding. [B, T] bool -> [B, T] int64."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, left: bool) -> Sequences:
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        input_ids[index, place] = torch.tensor(row)
        mask[index, place] = True
    mask = on_device(mask, device)
    return Sequences(on_device(input_ids, device), mask, positions(mask))


def at(values: Tensor, index: Tensor) -> Tensor:
    """Each row's value at its own position. [B, T], [B] -> [B]."""
    return values.gather(1, index.unsqueeze(1)).squeeze(1)
