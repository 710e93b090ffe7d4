"""The records that pass through the training core, and the letters of their shapes.

Shape legend
    B  sequences in a batch
    P  longest prompt of the batch, in tokens; prompts are padded on the left
    R  longest answer of the batch, in tokens; answers are padded on the right
    T  P + R, or the longest whole sequence where prompt and answer are not told apart
    N  tokens of a packed row, S  samples in it
    M  tokens of a packed row that are read (the learnt ones of SFT)
    V  vocabulary
Token at answer position r was chosen in the state before it, which is position P + r - 1 of the sequence: the
log-probability, value, reward and advantage of that action all stand at index r.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Micro = TypeVar("Micro")


class Sequences(NamedTuple):
    """Token sequences as a model takes them."""

    input_ids: Tensor
    """[B, T] int64"""
    attention_mask: Tensor
    """[B, T] bool; False on padding"""
    position_ids: Tensor
    """[B, T] int64; counts real tokens from 0, whatever side the padding is on"""


class Packed(NamedTuple):
    """Samples side by side in one row, without padding; attention stays inside each."""

    input_ids: Tensor
    """[1, N] int64"""
    position_ids: Tensor
    """[1, N] int64; counts from 0 in every sample"""
    cu_seqlens: Tensor
    """[S + 1] int32; sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1 of the row"""
    max_seqlen: int
    """No sample is longer."""


class LanguageBatch(NamedTuple):
    """Samples of SFT."""

    row: Packed
    learnt: Tensor
    """[M] int64; places in the row of the tokens that are learnt (those of the answers, EOS included)"""


class PairBatch(NamedTuple):
    """Preference pairs: the chosen and rejected answers of S / 2 pairs in one row."""

    row: Packed
    last: Tensor
    """[S] int64; place of each sample's last token, where the score is read: all chosen, then all rejected"""
    weight: Tensor
    """[S / 2] fp32"""


class Rollout(NamedTuple):
    """Prompts and the answers sampled for them."""

    sequences: Sequences
    """T = P + R"""
    answer_mask: Tensor
    """[B, R] bool; True on sampled tokens, EOS included"""
    logprobs: Tensor
    """[B, R] fp32, as sampled (temperature applied); 0 where masked"""
    ended: Tensor
    """[B] bool; True where the policy sampled EOS within its limit"""

    @property
    def start(self) -> int:
        """P, where the answers begin."""
        return self.sequences.input_ids.shape[1] - self.answer_mask.shape[1]

    def answers(self) -> list[list[int]]:
        """The tokens of each answer, EOS included."""
        tokens = self.sequences.input_ids[:, self.start :]
        return [row[mask].tolist() for row, mask in zip(tokens, self.answer_mask, strict=True)]


class Experience(NamedTuple):
    """A rollout with all that PPO's update needs, one row per sequence."""

    sequences: Sequences
    answer_mask: Tensor
    """[B, R] bool"""
    logprobs: Tensor
    """[B, R] fp32, of the policy that sampled, by the training forward pass (by sampling, in a pool of one step)"""
    values: Tensor
    """[B, R] fp32, of the critic before the update"""
    advantages: Tensor
    """[B, R] fp32"""
    returns: Tensor
    """[B, R] fp32"""


class PolicyStats(NamedTuple):
    """Sums over answer tokens; divide by the number of tokens."""

    approx_kl: Tensor
    clipped: Tensor
    ratio: Tensor


class StepReport(NamedTuple):
    """One optimizer step."""

    grad_norm: float
    """Before clipping, over all parameters and ranks; NaN in a step that was skipped."""
    learning_rate: float
    """Used in this step."""
    skipped: bool = False
    """Whether a gradient overflowed in fp16: nothing was changed but the loss scale, which is lowered."""
    loss: float = math.nan
    """That of `Engine.optimizer_step`; NaN of a step that was taken by halves."""


class Engine(Protocol):
    """What a training loop needs of an engine."""

    device: torch.device

    @property
    def module(self) -> Any:
        """The network inside (Policy or ScalarModel)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def optimizer_step(
        self, micro_batches: Sequence[Micro], loss_of: Callable[[Micro], Tensor], denominator: float
    ) -> StepReport:
        """One optimizer step over all ranks' micro-batches.

        The loss is the sum of `loss_of` over all micro-batches of all ranks, divided by the sum over ranks of
        `denominator` (tokens, or pairs, of this rank's micro-batches). Every rank gives the same number of them.
        """

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...
