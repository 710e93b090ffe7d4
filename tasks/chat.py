"""Asking models: answers piece by piece for a conversation, or in batches for a file of prompts.

A model is one of the registry, a Hugging Face folder, or a name of the hub; weights are read from safetensors alone.
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from data_prep import conversation
from data_prep.conversation import Message
from data_prep.local_files import read_file
from data_prep.tokenizer import answer_ids, load_tokenizer, prompt_ids
from tasks import prune, registered, tracking, untrusted
from tasks.base import resolve
from tasks.tracking import Store
from tasks.training.batches import at, right_padded
from tasks.training.models import load_policy, load_scalar
from tasks.training.sampling import Drawing, answers


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_tokens: int
    temperature: float
    """0: always the likeliest token."""
    top_p: float
    seed: int


class Speaker:
    """A model that answers."""

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        disable_progress_bar()  # of loading, which would stand in the conversation
        self.name, self.device = name, device
        untrusted.check(folder)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_policy(folder).model.to(device, _dtype(device)).eval()

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, None]:
        """An answer in pieces, as it is drawn. Closing the iterator ends the drawing.

        Raises ValueError for a conversation that leaves no room for an answer.
        """
        ids = torch.tensor([self._asked(messages, sampling)], device=self.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        torch.manual_seed(sampling.seed)
        how = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "streamer": streamer,
            "generation_config": self._config(sampling),
            "stopping_criteria": StoppingCriteriaList([_Asked(stop)]),
        }
        thread = threading.Thread(target=self.model.generate, kwargs=how, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()

    def answers(
        self, prompts: Sequence[Sequence[Message]], sampling: Sampling, batch_size: int | None = None
    ) -> Iterator[str]:
        """The answers to prompts in their order, so many drawn at a time; None: all.

        Raises ValueError before the first, for a prompt that leaves no room for an answer.
        """
        asked = [self._asked(messages, sampling) for messages in prompts]
        how = Drawing(
            limit=sampling.max_tokens,
            temperature=sampling.temperature,
            eos=self.tokenizer.eos_token_id,
            pad=self.tokenizer.pad_token_id,
            seed=sampling.seed * 1_000_003,  # each batch counts on from it
            top_p=sampling.top_p,
        )
        for rollout in answers(self.model, asked, how, batch_size or len(asked), self.device):
            for row in rollout.answers():
                yield str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()

    def _asked(self, messages: Sequence[Message], sampling: Sampling) -> list[int]:
        ids = prompt_ids(self.tokenizer, messages)
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and len(ids) + sampling.max_tokens > room:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and {self.name} has room for {room}, the answer's "
                f"{sampling.max_tokens} included; shorten it, or lower --max-tokens"
            )
        return ids

    def _config(self, sampling: Sampling) -> GenerationConfig:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=sampling.temperature > 0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **(drawn if sampling.temperature > 0 else {}),
        )


class Judge:
    """A reward model that scores answers; 0 is the mean of the preferred answers that it was evaluated on."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        untrusted.check(folder)
        self.device, self.tokenizer = device, load_tokenizer(folder)
        self.model = load_scalar(folder, self.tokenizer.pad_token_id).to(device, _dtype(device)).eval()

    @torch.no_grad()
    def score(self, messages: Sequence[Message], answer: str) -> float:
        """The reward of an answer to a conversation."""
        turn = Message(role="assistant", content=answer)
        ids = prompt_ids(self.tokenizer, messages) + answer_ids(self.tokenizer, messages, turn)
        whole = right_padded([ids], self.tokenizer.pad_token_id, self.device)
        return float(at(self.model(whole), whole.attention_mask.sum(1) - 1))


class _Asked(StoppingCriteria):
    """Ends generation when that is asked for."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


def speaker(name: str, store: Store | None) -> Speaker:
    """The model that a user names. Raises ValueError where it cannot be had."""
    if name.startswith(registered.SCHEME):
        if store is None:
            raise ValueError(f"{name}: there is no MLflow store here; give the workspace of the run with --workspace")
        version = tracking.named_version(store, name)
        with prune.in_use(Path(store.workspace)):
            folder = registered.as_stage(store, version, Path(store.workspace)).directory / "model"
            return Speaker(f"{version.name} {version.version}", folder, device())
    return Speaker(name, resolve(name, None), device())


def judge(name: str, store: Store | None) -> Judge | None:
    """The reward model of a registered policy, if it has one."""
    if store is None or not name.startswith(registered.SCHEME):
        return None
    for version in registered.companions(store, tracking.named_version(store, name)):
        if version.name.endswith(registered.REWARD):
            with prune.in_use(Path(store.workspace)):
                folder = registered.as_stage(store, version, Path(store.workspace)).directory
                return Judge(folder / "model", device())
    return None


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_prompts(path: Path) -> list[list[Message]]:
    """The conversations of a JSON, JSONL, CSV or Parquet file, from its column `prompt` or `messages`.

    Text becomes a user's message, or several where it is written as "Human: ... Assistant: ...". Raises ValueError that
    names the row.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; correct --prompts")
    table = read_file(path)
    column = next((name for name in ("prompt", "messages") if name in table.column_names), None)
    if column is None:
        raise ValueError(f"{path} has no column prompt or messages; it has {', '.join(table.column_names)}")
    return [_messages(value, f"{path}, row {row}") for row, value in enumerate(table[column].to_pylist(), 1)]


def _messages(value: object, where: str) -> list[Message]:
    if isinstance(value, str):
        is_written = conversation.begins_with_marker(value)
        messages = conversation.parse(value) if is_written else [Message(role="user", content=value)]
    elif isinstance(value, list):
        messages = [Message(role=str(turn["role"]), content=str(turn["content"])) for turn in value]
    else:
        raise ValueError(f"{where}: neither text nor messages but {value!r}")
    if not conversation.is_prompt(messages):
        raise ValueError(f"{where}: the turns have to alternate and end with the user's")
    return messages


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
