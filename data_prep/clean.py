"""Raw rows of one source to clean preference pairs; every row that is dropped has a named reason and is counted.

Drops: tie, low_score_ratio, empty, broken_characters, role_order, identical, too_long, duplicate, contradicted,
too_many_pairs, cap.  Fixes, counted by row: html_entities, citations, line_ends, nfc, stray_marker,
leading_marker.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from data_prep.conversation import (
    Message,
    begins_with_marker,
    has_turns,
    is_prompt,
    parse,
    without_leading_marker,
    without_stray_marker,
)
from data_prep.keys import digest, messages_digest, prompt_group
from data_prep.sources import RawPair, Row, Source, SourceSpec, source_of
from data_prep.tables import BATCH_ROWS, PAIR_SCHEMA, iter_rows, table_writer
from data_prep.text import repair

MAX_CHARS = 16_000
SIDES = ("train", "test")


class Pair(NamedTuple):
    """A preference, or a conversation to learn from (SFT only), which has no rejected answer."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    weight: float = 1.0

    @property
    def answers(self) -> tuple[list[Message], ...]:
        return (self.chosen, self.rejected) if self.rejected else (self.chosen,)


class _Dropped(Exception):  # noqa: N818 (a verdict, not a failure)
    """Ends the reading of a row; its argument is the reason."""


class _Kept(NamedTuple):
    """What the second look at a kept row needs: `row` names the exact pair, `answers` the pair in either order."""

    row: bytes
    answers: bytes
    group: str


def clean(spec: SourceSpec, raw: Path, out: Path, max_chars: int = MAX_CHARS) -> dict[str, Any]:
    """Write train.arrow and test.arrow (`tables.PAIR_SCHEMA`) from the Parquet files of `raw` ({split}/NNNN.parquet).

    max_chars: longest prompt with one answer.  Returns {"train" | "test" | "total": {"rows_in", "kept", "drops",
    "fixes"}}, where rows_in = kept + the sum of drops.  ValueError where no train row is left.
    """
    metrics = {side: _clean_side(spec, side, raw, out / f"{side}.arrow", max_chars) for side in SIDES}
    metrics["total"] = {
        "rows_in": sum(metrics[side]["rows_in"] for side in SIDES),
        "kept": sum(metrics[side]["kept"] for side in SIDES),
        "drops": dict(sum((Counter(metrics[side]["drops"]) for side in SIDES), Counter())),
        "fixes": dict(sum((Counter(metrics[side]["fixes"]) for side in SIDES), Counter())),
    }
    if not metrics["train"]["kept"]:
        train = metrics["train"]
        reasons = ", ".join(f"{reason} {count}" for reason, count in train["drops"].items()) or "it had none"
        raise ValueError(
            f"No train row of {spec.name} is left after cleaning {train['rows_in']} rows ({reasons}): "
            "correct the set, loosen its limits, or leave it out."
        )
    return metrics


def _clean_side(spec: SourceSpec, side: str, raw: Path, path: Path, max_chars: int) -> dict[str, Any]:
    """Two passes, so that memory holds keys and not text: read and judge each row alone, then against all others."""
    drops: Counter[str] = Counter()
    fixes: Counter[str] = Counter()
    draft = path.with_suffix(".draft")
    kept = _write_draft(spec, side, raw, draft, max_chars, drops, fixes)
    reasons = _contradicted(kept)
    most = spec.max_pairs_per_prompt or source_of(spec).pairs_per_group
    if most is not None:
        reasons |= _crowded(kept, most, reasons)
    if side == "train" and spec.max_rows is not None:
        reasons |= _over_cap(kept, spec.max_rows, reasons)
    with table_writer(path, PAIR_SCHEMA) as writer:
        for number, row in enumerate(iter_rows(draft)):
            if number in reasons:
                drops[reasons[number]] += 1
            else:
                writer.append(row)
    draft.unlink()
    rows_in = len(kept) + sum(drops.values()) - len(reasons)
    return {
        "rows_in": rows_in,
        "kept": writer.rows,
        "drops": dict(sorted(drops.items())),
        "fixes": dict(sorted(fixes.items())),
    }


def _write_draft(
    spec: SourceSpec, side: str, raw: Path, draft: Path, max_chars: int, drops: Counter[str], fixes: Counter[str]
) -> list[_Kept]:
    source = source_of(spec)
    kept: list[_Kept] = []
    seen: set[bytes] = set()
    with table_writer(draft, PAIR_SCHEMA) as writer:
        for row in _raw_rows(source, side, raw):
            try:
                pair, changed = read_pair(row, spec, max_chars)
                group = source.group(row)
                keys = _keys(pair, f"{spec.name}:{group}" if group else prompt_group(pair.prompt))
                if keys.row in seen:
                    raise _Dropped("duplicate")
            except _Dropped as dropped:
                drops[dropped.args[0]] += 1
                continue
            seen.add(keys.row)
            kept.append(keys)
            fixes.update(changed)
            writer.append({**pair._asdict(), "source": spec.name, "group": keys.group})
    return kept


def _raw_rows(source: Source, side: str, raw: Path) -> Iterator[Row]:
    for split in source.sides[side]:
        for file in sorted((raw / split).glob("*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(source.columns)):
                yield from batch.to_pylist()


def _keys(pair: Pair, group: str) -> _Kept:
    first, second = sorted((messages_digest(pair.prompt, pair.chosen), messages_digest(pair.prompt, pair.rejected)))
    return _Kept(
        row=messages_digest(pair.prompt, pair.chosen, pair.rejected),
        answers=digest(first.hex(), second.hex()),
        group=group,
    )


def _contradicted(kept: list[_Kept]) -> dict[int, str]:
    """Rows whose two answers are also preferred the other way round (exact duplicates are gone by now)."""
    times = Counter(keys.answers for keys in kept)
    return {number: "contradicted" for number, keys in enumerate(kept) if times[keys.answers] > 1}


def _crowded(kept: list[_Kept], most: int, gone: dict[int, str]) -> dict[int, str]:
    """Rows beyond the first `most` of their group, in which those that are gone take no place."""
    places: Counter[str] = Counter()
    crowded = {}
    for number, keys in enumerate(kept):
        if number not in gone:
            places[keys.group] += 1
            if places[keys.group] > most:
                crowded[number] = "too_many_pairs"
    return crowded


def _over_cap(kept: list[_Kept], max_rows: int, gone: dict[int, str]) -> dict[int, str]:
    """Rows beyond the first `max_rows` in the order of their hashes.

    The rest is a sample that does not follow the set's order, and most of it stays when the cap or the set grows.
    """
    order = sorted((number for number in range(len(kept)) if number not in gone), key=lambda number: kept[number].row)
    return dict.fromkeys(order[max_rows:], "cap")


def read_pair(row: Row, spec: SourceSpec, max_chars: int) -> tuple[Pair, set[str]]:
    """One raw row as a pair, and the names of the fixes it needed; raises `_Dropped` with the reason otherwise."""
    source = source_of(spec)
    reason = source.reject(row, spec)
    if reason:
        raise _Dropped(reason)
    raw = source.read(row)
    changed: set[str] = set()
    prompt = _prompt(raw, source, changed)
    if raw.sft_only:
        pair = Pair(prompt[:-1], prompt[-1:], [], raw.weight)
    else:
        answers = (_answer(raw.chosen, source, changed), _answer(raw.rejected, source, changed))
        pair = Pair(prompt, *answers, raw.weight)
        if not pair.rejected:
            raise _Dropped("empty")
    _check(pair, max_chars)
    return pair, changed


def _repaired(text: Any, source: Source, changed: set[str]) -> str:
    if text is None:
        return ""
    repaired, names = repair(str(text), (*source.repairs, "line_ends", "nfc"))
    changed.update(names)
    return repaired


def _prompt(raw: RawPair, source: Source, changed: set[str]) -> list[Message]:
    if isinstance(raw.prompt, list):
        return [_message(turn, source, changed) for turn in raw.prompt]
    text = _repaired(raw.prompt, source, changed)
    if source.form == "question" or (source.form == "either" and not begins_with_marker(text)):
        return [Message(role="user", content=text.strip())]
    if not text.strip():
        raise _Dropped("empty")
    try:
        messages = parse(text)
    except ValueError as error:  # a dialogue that begins in the middle of a turn
        raise _Dropped("role_order") from error
    return [Message(role=turn["role"], content=_without_stray(turn["content"], changed)) for turn in messages]


def _answer(answer: Any, source: Source, changed: set[str]) -> list[Message]:
    if isinstance(answer, list):
        return [_message(turn, source, changed) for turn in answer]
    text = _repaired(answer, source, changed).strip()
    shorter = without_leading_marker(text)
    if shorter != text:
        changed.add("leading_marker")
    return [Message(role="assistant", content=_without_stray(shorter, changed))]


def _message(turn: Any, source: Source, changed: set[str]) -> Message:
    if not turn:
        raise _Dropped("empty")
    return Message(role=str(turn["role"]), content=_repaired(turn["content"], source, changed).strip())


def _without_stray(text: str, changed: set[str]) -> str:
    shorter = without_stray_marker(text)
    if shorter != text:
        changed.add("stray_marker")
    return shorter


def _check(pair: Pair, max_chars: int) -> None:
    """Raise `_Dropped` with the first reason that speaks against the pair."""
    contents = [turn["content"] for turns in (pair.prompt, *pair.answers) for turn in turns]
    if not pair.prompt or not pair.chosen or not all(contents):
        raise _Dropped("empty")
    if any("\ufffd" in content for content in contents):
        raise _Dropped("broken_characters")
    if not is_prompt(pair.prompt) or any([turn["role"] for turn in turns] != ["assistant"] for turns in pair.answers):
        raise _Dropped("role_order")
    if any(has_turns(turns[0]["content"]) for turns in pair.answers):
        raise _Dropped("role_order")
    if pair.chosen == pair.rejected:
        raise _Dropped("identical")
    prompt_chars = sum(len(turn["content"]) for turn in pair.prompt)
    if prompt_chars + max(len(turns[0]["content"]) for turns in pair.answers) > max_chars:
        raise _Dropped("too_long")
