"""Samples side by side in rows of at most so many tokens, instead of one per row with padding.

A micro-batch is one row. Which samples share a row changes nothing in the loss, which is a sum over the tokens (or
pairs) of the optimizer batch; attention stays inside each sample (attention.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.training.ranks import rank, world_size
from tasks.training.types import Packed


def own_rows(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """This rank's rows, each a list of sample indices; every rank gets equally many, of about equal lengths.

    All ranks call it with the same sizes and share all samples between them. Under ZeRO-3 each forward pass gathers
    parameters from all ranks, so none may make one more than the others. Where samples that each have a row of their
    own cannot be shared equally, the last rows are empty; a multiple of the number of ranks has none.
    """
    rows = best_fit(sizes, budget)
    while len(rows) % world_size():
        halved = max(rows, key=lambda row: (len(row) > 1, sum(sizes[sample] for sample in row)))
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


def is_dense(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> bool:
    """Whether a row is a plain batch in disguise: no sample shorter than `max_seqlen`."""
    return (len(cu_seqlens) - 1) * max_seqlen == tokens


def in_few_shapes(row: Packed, tokens: int = 2048, samples: int = 64) -> Packed:
    """The same row with samples after its end that nobody reads, so that compiled layers see few different shapes.

    Its length becomes a multiple of `tokens`, its count of samples one of `samples` (empty ones fill it up), its
    longest sample a power of two. A dense row is left as it is.
    """
    begin, longest = row.input_ids.shape[1], row.max_seqlen
    if is_dense(row.cu_seqlens, longest, begin):
        return row
    end = begin + -begin % tokens
    ends = [*range(begin + longest, end, longest), *([end] if end > begin else [])]
    ends += [end] * (-(len(row.cu_seqlens) - 1 + len(ends)) % samples)
    more = on_device(torch.tensor(ends, dtype=torch.int32), row.cu_seqlens.device)
    return Packed(
        input_ids=F.pad(row.input_ids, (0, end - begin)),
        position_ids=torch.cat(
            [row.position_ids, torch.arange(end - begin, device=row.input_ids.device)[None] % longest], 1
        ),
        cu_seqlens=torch.cat([row.cu_seqlens, more]),
        max_seqlen=1 << (longest - 1).bit_length(),
    )


def packed(samples: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Token ids of samples -> one row, in their order."""
    lengths = [len(sample) for sample in samples]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    places = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.tensor([token for sample in samples for token in sample])
    return Packed(
        input_ids=on_device(ids.unsqueeze(0), device),
        position_ids=on_device(places.unsqueeze(0), device),
        cu_seqlens=on_device(ends.int(), device),
        max_seqlen=max(lengths),
    )


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor copied to the device, without a wait for what the GPU is doing before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
