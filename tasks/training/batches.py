"""Rows of token ids -> padded tensors, and the order in which rows are trained on.

The order is a function of seed and step alone, so a resumed run needs no more than its step to know what comes next.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tasks.training.ranks import rank, world_size
from tasks.training.types import LanguageBatch, PairBatch, Sequences

Row = TypeVar("Row")


def batch_indices(step: int, rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of this rank's share of the optimizer batch at a step; every pass over the rows is shuffled anew.

    The last rows of a pass that do not fill a batch are left out of that pass.

    Args:
        step: optimizer step, from 0.
        rows: number of rows, at least batch_size.
        batch_size: rows of the whole optimizer batch, a multiple of the number of ranks.
    """
    per_epoch = rows // batch_size
    assert per_epoch, f"{rows} rows make no batch of {batch_size}"
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    share = batch_size // world_size()
    begin = index * batch_size + rank() * share
    return order[begin : begin + share].tolist()


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


def language_batch(rows: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device) -> LanguageBatch:
    """Rows with `prompt` and `answer` token ids -> a batch padded on the right; the answers are learnt."""
    sequences = right_padded([row["prompt"] + row["answer"] for row in rows], pad_id, device)
    learnt = torch.zeros(sequences.input_ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        learnt[index, learnt_places(row)] = True
    return LanguageBatch(sequences, learnt.to(device))


def learnt_places(row: Mapping[str, Any]) -> list[int]:
    """The places in prompt + answer that SFT learns: the answer's, but for the spans in `others`, if there are any.

    An SFT-only row is a whole conversation, whose answer holds turns of the user as well.
    """
    start = len(row["prompt"])
    others = {place for span in row.get("others") or () for place in range(span["begin"], span["end"])}
    return [start + place for place in range(len(row["answer"])) if place not in others]


def pair_batch(rows: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device) -> PairBatch:
    """Rows with `prompt`, `chosen` and `rejected` token ids -> chosen and rejected answers in one batch."""
    ids = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
    sequences = right_padded(ids, pad_id, device)
    weight = torch.tensor([row["weight"] for row in rows], dtype=torch.float32, device=device)
    return PairBatch(sequences, sequences.attention_mask.sum(1) - 1, weight)


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
    mask = mask.to(device)
    return Sequences(input_ids.to(device), mask, positions(mask))


def at(values: Tensor, index: Tensor) -> Tensor:
    """Each row's value at its own position. [B, T], [B] -> [B]."""
    return values.gather(1, index.unsqueeze(1)).squeeze(1)
