"""Samples side by side in rows of at most so many tokens, instead of one per row with padding.

A micro-batch is one row. Which samples share a row changes nothing in the loss, which is a sum over the tokens (or
pairs) of the optimizer batch; attention stays inside each sample (attention.py).
"""

from collections.abc import Sequence

import torch

from tasks.training.ranks import rank, world_size
from tasks.training.types import Packed


def own_rows(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """This rank's rows, each a list of sample indices; every rank gets equally many, of about equal lengths.

    All ranks call it with the same sizes, at least one sample per rank, and share all samples between them. Under
    ZeRO-3 each forward pass gathers parameters from all ranks, so none may make one more than the others.
    """
    rows = best_fit(sizes, budget)
    while len(rows) % world_size():
        halved = max((row for row in rows if len(row) > 1), key=lambda row: sum(sizes[sample] for sample in row))
        rows.remove(halved)
        rows += [halved[::2], halved[1::2]]
    rows.sort(key=lambda row: sum(sizes[sample] for sample in row), reverse=True)
    return rows[rank() :: world_size()]


def best_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Sample indices in rows of at most `budget` tokens: the longest sample first, each into the fullest row it fits.

    Best-fit decreasing: at most 11/9 of the fewest rows possible, and one more (Johnson 1973). A sample that is longer
    than the budget has a row to itself.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(sizes)), key=lambda sample: -sizes[sample]):
        fitting = [row for row in range(len(rows)) if room[row] >= sizes[sample]]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
            rows[row].append(sample)
            room[row] -= sizes[sample]
        else:
            rows.append([sample])
            room.append(budget - sizes[sample])
    return rows


def packed(samples: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Token ids of samples -> one row, in their order."""
    lengths = [len(sample) for sample in samples]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    places = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.tensor([token for sample in samples for token in sample])
    return Packed(
        input_ids=ids.unsqueeze(0).to(device),
        position_ids=places.unsqueeze(0).to(device),
        cu_seqlens=ends.to(device, torch.int32),
        max_seqlen=max(lengths),
    )
