"""Split pairs to ragged tables of token ids, unpadded, as the training loops read them.

sft-{side}: prompt, answer and others, the spans of the answer that are not learnt: an SFT-only row is a whole
conversation, of which all assistant's turns are learnt; its answer begins with the first.  reward-{side} and
judge-{side}: prompt, chosen, rejected, weight.  ppo-{side}: each prompt once, with its messages, so that a policy with
another tokenizer can be asked the same.  All have their source and group.  Every answer ends in EOS.  Nothing is cut:
what is too long is dropped and counted.

What a reward model is judged on, and the prompts that a policy is, are those held out in any phase, their own first:
nothing is trained on them, and the more there are, the narrower are the intervals of accuracy and win rate. SFT's
perplexity needs no more than its own. They come in the order of a hash of their prompts, not source by source or group
by group, so that who reads the first so many reads of all.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from data_prep.keys import fraction, messages_digest, prompt_group
from data_prep.splits import PHASES, SIDES
from data_prep.spread import Mapper
from data_prep.tables import MESSAGES, iter_rows, table_writer
from data_prep.tokenizer import (
    answer_ids,
    answer_text,
    check_eos,
    encode,
    holds_special,
    load_tokenizer,
    prompt_ids,
    prompt_text,
    turn_texts,
)

__all__ = ["answer_ids", "check_eos", "load_tokenizer", "prompt_ids", "tokenise"]

BATCH = 1024

_IDS = pa.list_(pa.int32())
_SPANS = pa.list_(pa.struct([("begin", pa.int32()), ("end", pa.int32())]))
_ORIGIN = [("source", pa.string()), ("group", pa.string())]
_PAIR_IDS = pa.schema([("prompt", _IDS), ("chosen", _IDS), ("rejected", _IDS), ("weight", pa.float32()), *_ORIGIN])
SCHEMAS = {
    "sft": pa.schema([("prompt", _IDS), ("answer", _IDS), ("others", _SPANS), *_ORIGIN]),
    "reward": _PAIR_IDS,
    "judge": _PAIR_IDS,
    "ppo": pa.schema([("prompt", _IDS), ("messages", MESSAGES), *_ORIGIN]),
}
KEPT = ("source", "group", "weight")  # as they are, where the schema has them
# Which answers of a pair each phase reads, and what the column is called there.
ANSWERS: dict[str, dict[str, str]] = {
    "sft": {"answer": "chosen"},
    "reward": {"chosen": "chosen", "rejected": "rejected"},
    "judge": {"chosen": "chosen", "rejected": "rejected"},
    "ppo": {},
}


Trusted = tuple[str | Path, bool]
"""A tokenizer's folder, and whether code that it brings may run."""


class Limits(NamedTuple):
    prompt: int
    answer: int


def tokenise(
    split_dir: Path,
    tokenizer_dir: str | Path,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    out: Path,
    mapped: Mapper = map,
    trusted: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write {phase}-{side}.arrow (`SCHEMAS`) for every {phase}-{side}.arrow of `split_dir`.

    max_answer_tokens counts the EOS; an SFT-only conversation may have max_prompt_tokens + max_answer_tokens.  Drops:
    prompt_too_long, answer_too_long, conversation_too_long, special_token (a text spells one out), identical (two
    answers with the same ids), duplicate (PPO's prompts and SFT's answers come once), outranked (SFT: an answer that
    another pair rejects; of a prompt's ranked answers, only the best is learnt).  mapped: `map`, or another that makes
    the ids of many rows elsewhere, where `tokenizer_dir` is there too.  trusted: code that the tokenizer brings may
    run.  Returns {phase: {side: {"rows_in", "kept", "drops", "tokens": {column: {"mean", "p50", "p90", "p99", "max",
    "sum"}}}}}.  ValueError where nothing of a file is left.
    """
    limits = Limits(max_prompt_tokens, max_answer_tokens)
    every = [(phase, side, f"{phase}-{side}.arrow") for phase in PHASES for side in SIDES]
    files = [(phase, side, name) for phase, side, name in every if (split_dir / name).is_file()]
    held_out = [split_dir / name for _, side, name in files if side == "eval"]
    if not files:
        raise ValueError(f"The folder {split_dir} holds no split tables: run the split step first.")
    metrics: dict[str, dict[str, Any]] = {}
    for phase, side, name in files:
        own = split_dir / name
        others = held_out if side == "eval" and phase != "sft" else []
        paths = [own, *(path for path in others if path != own)]
        read = _by_hash if side == "eval" else iter_rows
        counts = _tokenise_file(paths, read, phase, (tokenizer_dir, trusted), limits, out / name, mapped)
        metrics.setdefault(phase, {})[side] = counts
        _check_left(phase, side, counts, limits)
    return metrics


def _reads_pairs(phase: str) -> bool:
    """Whether a model of this phase learns which of two answers is better."""
    return "rejected" in ANSWERS[phase]


def _check_left(phase: str, side: str, counts: dict[str, Any], limits: Limits) -> None:
    if not counts["kept"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["drops"].items()) or "it had no rows"
        raise ValueError(
            f"No {side} row of {phase} is left after tokenising ({reasons}): raise data.max_prompt_tokens "
            f"(now {limits.prompt}) or data.max_answer_tokens (now {limits.answer})."
        )


def _by_hash(path: Path) -> list[dict[str, Any]]:
    """The rows of a table in an order that stays as it is when others come between them.

    Not that of their groups: one that thousands of conversations with the same first turn make would be one block.
    """
    return sorted(iter_rows(path), key=lambda row: fraction("order", prompt_group(row["prompt"])))


def _tokenise_file(
    paths: list[Path],
    read: Callable[[Path], Iterable[dict[str, Any]]],
    phase: str,
    tokenizer: Trusted,
    limits: Limits,
    out: Path,
    mapped: Mapper,
) -> dict[str, Any]:
    drops: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {column: [] for column in ("prompt", *ANSWERS[phase])}
    waiting: deque[list[dict[str, Any]]] = deque()
    rows_in = 0

    def fresh_batches() -> Iterator[tuple[str, Trusted, list[dict[str, Any]]]]:
        nonlocal rows_in
        seen: set[bytes] = set()
        worse = _rejected(paths) if phase == "sft" else frozenset()
        for batch in _batches(chain.from_iterable(map(read, paths))):
            if _reads_pairs(phase):
                batch = [row for row in batch if row["rejected"]]
            rows_in += len(batch)
            good = (
                [row for row in batch if messages_digest(row["prompt"], row["chosen"]) not in worse] if worse else batch
            )
            drops["outranked"] += len(batch) - len(good)
            fresh = [row for row in good if not _is_repeated(phase, row, seen)]
            drops["duplicate"] += len(good) - len(fresh)
            waiting.append(fresh)
            yield phase, tokenizer, fresh

    with table_writer(out, SCHEMAS[phase]) as writer:
        for encoded in mapped(_encode_batch, fresh_batches()):
            for row, (ids, others) in zip(waiting.popleft(), encoded, strict=True):
                reason = _reason(ids, limits, whole=phase == "sft" and not row["rejected"])
                if reason:
                    drops[reason] += 1
                    continue
                assert ids is not None, "a row without ids has a reason"
                for column, tokens in ids.items():
                    lengths[column].append(len(tokens))
                writer.append(
                    {**ids, "others": others, "messages": row["prompt"], **{name: row[name] for name in KEPT}}
                )
    return {
        "rows_in": rows_in,
        "kept": writer.rows,
        "drops": {reason: count for reason, count in sorted(drops.items()) if count},
        "tokens": {column: _summary(values) for column, values in lengths.items() if values},
    }


def _rejected(paths: Iterable[Path]) -> set[bytes]:
    """The answers, with their prompts, that some pair rejects."""
    rows = chain.from_iterable(iter_rows(path, ["prompt", "rejected"]) for path in paths)
    return {messages_digest(row["prompt"], row["rejected"]) for row in rows if row["rejected"]}


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _is_repeated(phase: str, row: dict[str, Any], seen: set[bytes]) -> bool:
    """Whether the phase has met all that it reads of this row: one good answer stands in several pairs."""
    if phase not in ("sft", "ppo"):
        return False
    key = messages_digest(row["prompt"], *(row[answer] for answer in ANSWERS[phase].values()))
    if key in seen:
        return True
    seen.add(key)
    return False


Ids = dict[str, list[int]]
Spans = list[dict[str, int]]


def _encode_batch(batch: tuple[str, Trusted, list[dict[str, Any]]]) -> list[tuple[Ids | None, Spans]]:
    """Token ids by column for each row, None where a text holds a special token, and the spans that are not learnt.

    Equal texts are tokenised once.  batch: the phase, the tokenizer's folder with whether it is trusted, and rows.
    """
    phase, (folder, trusted), rows = batch
    tokenizer = _loaded(folder, trusted)
    texts = [_texts(row, phase, tokenizer) for row in rows]
    unique = list(dict.fromkeys(text for row in texts if row for column in row.values() for text in column))
    ids = dict(zip(unique, encode(tokenizer, unique), strict=True))
    return [_joined(row, ids) if row else (None, []) for row in texts]


@lru_cache(maxsize=1)
def _loaded(folder: str | Path, trusted: bool) -> PreTrainedTokenizerBase:
    """Once in each process that makes ids."""
    return load_tokenizer(folder, trusted)


def _joined(texts: dict[str, list[str]], ids: Mapping[str, list[int]]) -> tuple[Ids, Spans]:
    parts = {column: [ids[text] for text in texts[column]] for column in texts}
    ends = list(accumulate(len(part) for part in parts.get("answer", [])))
    others = [{"begin": begin, "end": end} for begin, end in zip(ends[::2], ends[1::2], strict=False)]
    return {column: [token for part in of_column for token in part] for column, of_column in parts.items()}, others


def _texts(row: dict[str, Any], phase: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]] | None:
    """By column, the texts that are tokenised each by itself; those of an answer are learnt, and not, in turn."""
    answers = {column: row[name][0] for column, name in ANSWERS[phase].items()}
    if holds_special(tokenizer, (turn["content"] for turn in (*row["prompt"], *answers.values()))):
        return None
    if phase == "sft" and not row["rejected"]:
        prompt, *turns = turn_texts(tokenizer, [*row["prompt"], answers["answer"]])
        return {"prompt": [prompt], "answer": turns}
    prompt = prompt_text(tokenizer, row["prompt"])
    return {"prompt": [prompt]} | {
        column: [answer_text(tokenizer, prompt, row["prompt"], answer)] for column, answer in answers.items()
    }


def _reason(ids: Ids | None, limits: Limits, whole: bool) -> str | None:
    """whole: SFT learns the row as one conversation."""
    if ids is None:
        return "special_token"
    if whole:
        tokens = sum(len(column) for column in ids.values())
        return "conversation_too_long" if tokens > limits.prompt + limits.answer else None
    if len(ids["prompt"]) > limits.prompt:
        return "prompt_too_long"
    answers = [tokens for column, tokens in ids.items() if column != "prompt"]
    if any(len(tokens) > limits.answer for tokens in answers):
        return "answer_too_long"
    if len(answers) == 2 and answers[0] == answers[1]:
        return "identical"
    return None


def _summary(values: list[int]) -> dict[str, float]:
    median, high, highest = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return {
        "mean": float(np.mean(values)),
        "p50": median,
        "p90": high,
        "p99": highest,
        "max": max(values),
        "sum": sum(values),
    }
