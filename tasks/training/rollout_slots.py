"""Sampling answers fast: slots in a static cache, refilled as answers end, one CUDA graph for a step.

DeepSpeed's rollout interface (`deepspeed.runtime.rollout.base`), with what PPO needs and it lacks: log-probabilities of
the tokens as they were sampled, EOS, a seed, a limit for each answer. DeepSpeed's own engine replays graphs for answers
of one fixed length; its continuous batching does without graphs.

    slot    room for one prompt and its answer in the cache; S of them, each at its own length
    step    one token for the M first slots of `order`, the running ones before all others

Kernels read a slot's length from memory, so one graph per M serves the whole rollout and a finished row costs nothing.
A step is a function of device memory alone; the host only decides what runs next, from flags that it copies without
waiting and reads one turn later. On a CPU the same code runs step by step.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.runtime.rollout.base import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from torch import Tensor

from tasks.training import decode
from tasks.training.batches import positions
from tasks.training.decoder import decoder_of
from tasks.training.types import Rollout, Sequences

TURN = 8
"""Steps between two looks at the flags."""
PREFILL_TOKENS = 32_768
"""Prompt tokens, padding included, that are read in one pass."""
LEAST_ROWS = 8
"""Of a graph: fewer rows cost the same."""


@dataclass
class Request(RolloutRequest):
    """Prompts [B, P], padded on the left."""

    limits: Tensor | None = None
    """[B] int64 on the CPU; tokens that each answer may have, at most `max_new_tokens`. None: that many"""


@dataclass
class Sampling(SamplingConfig):
    """How to sample; `top_k` and `top_p` must be off."""

    eos_id: int = -1
    """Ends an answer; -1: nothing does"""
    pad_id: int = 0
    seed: int = 0
    """An answer is a function of the weights, the seed and the prompt's number in the request."""
    greedy: bool = False


@dataclass
class Batch(RolloutBatch):
    """Prompts and answers, [B, P + R], with what was seen as they were sampled."""

    logprobs: Tensor
    """[B, R] fp32, temperature applied; 0 where masked"""
    ended: Tensor
    """[B] bool"""

    def rollout(self) -> Rollout:
        """The same as the training core takes it."""
        answer_mask = self.attention_mask[:, self.input_ids.shape[1] - self.logprobs.shape[1] :]
        sequences = Sequences(self.input_ids, self.attention_mask, positions(self.attention_mask))
        return Rollout(sequences, answer_mask, self.logprobs, self.ended)


class State(NamedTuple):
    """What a step reads and writes. [S] but where said."""

    order: Tensor
    """int64; the slots, those that run first"""
    token: Tensor
    """int64; sampled last, not in the cache yet"""
    length: Tensor
    """int64; tokens in the cache"""
    drawn: Tensor
    """int64; tokens of the answer so far"""
    limit: Tensor
    """int64; of the answer"""
    number: Tensor
    """int64; of the prompt"""
    active: Tensor
    """bool; the answer goes on"""
    ended: Tensor
    """bool; by EOS"""
    answers: Tensor
    """[S, R] int64"""
    logprobs: Tensor
    """[S, R] fp32"""
    seed: Tensor
    """[1] int64"""


class Running(NamedTuple):
    """What the host knows of a slot that is in use."""

    number: int
    steps_left: int
    """At most."""


class SlotEngine(RolloutEngine):
    """Samples from a transformers causal language model of a family that `decoder.py` knows, on its own weights.

    Args:
        model: the language model, on its device, in eval mode while it samples.
        slots: answers that are sampled at a time.
        prompt_tokens, answer_tokens: the most that a request may have.

    Raises UnsupportedError if only the plain loop can sample from this model.
    """

    name = "slots"

    def __init__(self, model: Any, slots: int, prompt_tokens: int, answer_tokens: int) -> None:
        self.model = model
        self.slots, self.answer_tokens = slots, answer_tokens
        self.capacity = prompt_tokens + answer_tokens
        self.decoder = decoder_of(model, self.capacity)
        weight = self.decoder.head.weight
        assert isinstance(weight, Tensor)
        self.device, self.dtype = weight.device, weight.dtype
        self.angles = self.decoder.angles(self.capacity, self.device, self.dtype)
        self.capture_seconds = 0.0
        """Spent so far on making graphs, kernels' compilation included."""
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._pointers = self._weights()
        self._memory: tuple[State, list[decode.Cache]] | None = None

    @property
    def cache_bytes(self) -> int:
        """Memory that the keys and values of all slots take."""
        decoder = self.decoder
        per_token = 2 * len(decoder.layers) * decoder.key_heads * decoder.head_size * self.dtype.itemsize
        return per_token * self.capacity * self.slots

    def sync_weights(self, step: int) -> None:
        """The weights are the policy's own; graphs are dropped if these have moved in memory."""
        if self._weights() != self._pointers:
            self.decoder = decoder_of(self.model, self.capacity)
            self._pointers = self._weights()
            self._graphs.clear()

    def shutdown(self) -> None:
        """Give the cache and the graphs back; the next rollout makes them anew."""
        self._graphs.clear()
        self._memory = None

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> Batch:
        """Answers to all prompts, `n_samples_per_prompt` each, in the prompts' order."""
        if not isinstance(sampling, Sampling):
            sampling = Sampling(**vars(sampling))
        assert sampling.top_p == 1.0, "the plain loop truncates distributions"
        assert sampling.top_k <= 0, "the plain loop truncates distributions"
        assert sampling.max_new_tokens <= self.answer_tokens
        self.sync_weights(0)
        return _Run(self, request, sampling).batch()

    def memory(self) -> tuple[State, list[decode.Cache]]:
        """State and cache, made when first asked for."""
        if self._memory is None:
            decoder = self.decoder
            shape = (self.slots, decoder.key_heads, self.capacity, decoder.head_size)
            caches = [
                decode.Cache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
                for _ in decoder.layers
            ]
            self._memory = self._state(), caches
        return self._memory

    def _state(self) -> State:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        count, limit = self.slots, self.answer_tokens
        return State(
            order=torch.arange(count, device=self.device),
            **{name: zeros(count) for name in ("token", "length", "drawn", "limit", "number")},
            active=zeros(count, dtype=torch.bool),
            ended=zeros(count, dtype=torch.bool),
            answers=zeros(count, limit),
            logprobs=zeros(count, limit, dtype=torch.float32),
            seed=zeros(1),
        )

    def prefill(self, prompts: Tensor, lengths: Tensor, slots: Tensor, sampling: Sampling) -> None:
        """Read prompts into slots, whose state is set, and sample the first token of each answer.

        Args: prompts: [B, P] int64, padded on the right; lengths, slots: [B] int64.
        """
        _, caches = self.memory()
        rows, width = prompts.shape
        angles = None if self.angles is None else [part[:width].unsqueeze(1) for part in self.angles]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (part.unflatten(0, (rows, width)) for part in (query, key, value))
            if angles is not None:
                query, key = decode.turned(query, *angles), decode.turned(key, *angles)
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            caches[layer].keys[slots, :, :width] = key
            caches[layer].values[slots, :, :width] = value
            # The padding stands after the prompt, where a causal mask hides it from all tokens that matter.
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.decoder.scale, enable_gqa=key.shape[1] < query.shape[1]
            )
            return out.transpose(1, 2).flatten(0, 1)

        place = torch.arange(width, device=self.device).repeat(rows)
        hidden = self.decoder.hidden(prompts.flatten(), place, attend).unflatten(0, (rows, width))
        last = hidden[torch.arange(rows, device=self.device), lengths - 1]
        self._sample(slots, last, sampling)

    def step(self, rows: int, sampling: Sampling) -> None:
        """One token for the first `rows` slots of the order, by a graph where there is a GPU."""
        if self.device.type != "cuda":
            return self._step(rows, sampling)
        key = (rows, sampling.temperature, sampling.greedy, sampling.eos_id)
        if key not in self._graphs:
            began = time.perf_counter()
            self._graphs[key] = self._capture(lambda: self._step(rows, sampling))
            self.capture_seconds += time.perf_counter() - began
        self._graphs[key].replay()

    def _step(self, rows: int, sampling: Sampling) -> None:
        state, caches = self.memory()
        chosen = state.order[:rows]
        slots = decode.Slots(chosen, state.length, state.active)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return decode.attend(query, key, value, caches[layer], slots, self.angles, self.decoder.scale)

        hidden = self.decoder.hidden(state.token[chosen], state.length[chosen], attend)
        state.length[chosen] += state.active[chosen].long()
        self._sample(chosen, hidden, sampling)

    def _sample(self, slots: Tensor, hidden: Tensor, sampling: Sampling) -> None:
        """Choose the next tokens of slots and note them; slots that are not active stay as they are."""
        state, _ = self.memory()
        count, active = state.drawn[slots], state.active[slots]
        tokens, logprobs = decode.choose(
            self.decoder.head(hidden), sampling.temperature, sampling.greedy, state.seed, state.number[slots], count
        )
        place = count.clamp(max=self.answer_tokens - 1)
        state.answers[slots, place] = torch.where(active, tokens, state.answers[slots, place])
        state.logprobs[slots, place] = torch.where(active, logprobs, state.logprobs[slots, place])
        state.token[slots] = tokens
        count = count + active.long()
        state.drawn[slots] = count
        ends = tokens == sampling.eos_id
        state.ended[slots] |= active & ends
        state.active[slots] = active & ~ends & (count < state.limit[slots])

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of a step. The step is run once before, on slots that are not active, to compile its kernels."""
        active = self.memory()[0].active
        before = active.clone()
        active.zero_()
        token = self.memory()[0].token.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=next(iter(self._graphs.values())).pool() if self._graphs else None):
            step()
        active.copy_(before)
        self.memory()[0].token.copy_(token)
        return graph

    def _weights(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.model.parameters()]


class _Run:
    """One request in the slots: which prompts wait, which run where, what came out."""

    def __init__(self, engine: SlotEngine, request: RolloutRequest, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        repeats = sampling.n_samples_per_prompt
        self.ids = request.prompt_ids.repeat_interleave(repeats, 0)
        self.mask = request.prompt_attention_mask.bool().repeat_interleave(repeats, 0)
        self.lengths = self.mask.sum(1).cpu()
        limits = getattr(request, "limits", None)
        count = len(self.ids)
        if limits is None:
            limits = torch.full((count // repeats,), sampling.max_new_tokens)
        self.limits = limits.repeat_interleave(repeats).clamp(max=sampling.max_new_tokens)
        # Prompts of like length are read together, so that they need little padding.
        self.waiting = deque(self.lengths.argsort(descending=True, stable=True).tolist())
        self.running: dict[int, Running] = {}
        self.free = list(range(engine.slots))
        device, width = engine.device, engine.answer_tokens
        self.answers = torch.full((count, width), sampling.pad_id, device=device)
        self.logprobs = torch.zeros(count, width, device=device)
        self.counts = torch.zeros(count, dtype=torch.int64, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)

    def batch(self) -> Batch:
        """Run to the end."""
        state, _ = self.engine.memory()
        state.seed.fill_(scattered(self.sampling.seed))
        state.active.zero_()
        flags: deque[tuple[Callable[[], list[bool]], dict[int, Running]]] = deque()
        enough = max(1, self.engine.slots // 8)  # slots that make it worth while to read prompts
        while self.waiting or self.running:
            if self.waiting and (len(self.free) >= min(enough, len(self.waiting)) or not self.running):
                self._admit()
            self._turn()
            flags.append((_later(state.active), dict(self.running)))
            finished = [slot for slot, running in self.running.items() if running.steps_left <= 0]
            if len(flags) > 1:
                read, then = flags.popleft()
                active = read()
                finished += [
                    slot
                    for slot, running in self.running.items()
                    if slot in then and then[slot].number == running.number and not active[slot]
                ]
            self._retire(sorted(set(finished)))
        return self._batch()

    def _admit(self) -> None:
        """Give free slots to the prompts that wait next."""
        state, _ = self.engine.memory()
        while self.free and self.waiting:
            width = int(self.lengths[self.waiting[0]])
            count = min(len(self.free), len(self.waiting), max(1, PREFILL_TOKENS // width))
            numbers = [self.waiting.popleft() for _ in range(count)]
            slots = [self.free.pop(0) for _ in range(count)]
            where, which = self._on_device(slots), self._on_device(numbers)
            lengths, limits = self._on_device(self.lengths[numbers]), self._on_device(self.limits[numbers])
            state.length[where], state.limit[where], state.number[where] = lengths, limits, which
            state.drawn[where] = 0
            state.ended[where] = False
            state.active[where] = True
            # From the left padding of the request to padding after the prompt.
            columns = torch.arange(width, device=self.engine.device) + (self.ids.shape[1] - lengths).unsqueeze(1)
            prompts = self.ids[which].gather(1, columns.clamp(max=self.ids.shape[1] - 1))
            self.engine.prefill(prompts, lengths, where, self.sampling)
            self.running |= {
                slot: Running(number, int(self.limits[number]) - 1) for slot, number in zip(slots, numbers, strict=True)
            }
        self._reorder()

    def _turn(self) -> None:
        """Some steps of all slots that run."""
        steps = min(TURN, max(running.steps_left for running in self.running.values()))
        rows = self._rows()
        for _ in range(steps):
            self.engine.step(rows, self.sampling)
        self.running = {s: r._replace(steps_left=r.steps_left - steps) for s, r in self.running.items()}

    def _rows(self) -> int:
        """The rows of a step: on a GPU a power of two of them, or all slots, so that few graphs serve all."""
        if self.engine.device.type != "cuda":
            return len(self.running)
        rows = LEAST_ROWS
        while rows < len(self.running):
            rows *= 2
        return min(rows, self.engine.slots)

    def _retire(self, slots: Sequence[int]) -> None:
        """Take the answers out of slots, which are free then."""
        if not slots:
            return
        state, _ = self.engine.memory()
        where = self._on_device(slots)
        which = self._on_device([self.running.pop(slot).number for slot in slots])
        count = state.drawn[where]
        kept = torch.arange(self.answers.shape[1], device=where.device) < count.unsqueeze(1)
        self.answers[which] = torch.where(kept, state.answers[where], self.sampling.pad_id)
        self.logprobs[which] = torch.where(kept, state.logprobs[where], 0.0)
        self.counts[which], self.ended[which] = count, state.ended[where]
        self.free += slots
        self._reorder()

    def _reorder(self) -> None:
        others = [slot for slot in range(self.engine.slots) if slot not in self.running]
        self.engine.memory()[0].order.copy_(self._on_device([*self.running, *others]))

    def _on_device(self, values: Sequence[int] | Tensor) -> Tensor:
        """Integers on the engine's device, without waiting for it."""
        tensor = torch.as_tensor(values, dtype=torch.int64)
        if self.engine.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.engine.device, non_blocking=True)

    def _batch(self) -> Batch:
        width = max(1, int(self.counts.max()))
        kept = torch.arange(width, device=self.counts.device) < self.counts.unsqueeze(1)
        return Batch(
            input_ids=torch.cat([self.ids, self.answers[:, :width]], 1),
            attention_mask=torch.cat([self.mask, kept], 1),
            response_start_idx=torch.full((len(self.ids),), self.ids.shape[1], device=self.ids.device),
            logprobs=self.logprobs[:, :width],
            ended=self.ended,
        )


def scattered(seed: int) -> int:
    """A 62-bit hash of a seed: the noise keys of two seeds, each a range of integers, shall not meet."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest()) >> 2


def _later(flags: Tensor) -> Callable[[], list[bool]]:
    """A copy of flags on its way to the host; the result waits for it, and gives them."""
    if not flags.is_cuda:
        values = flags.tolist()
        return lambda: values
    copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
    copy.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[bool]:
        event.synchronize()
        return copy.tolist()

    return read
