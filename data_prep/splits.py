"""The blended set to phases (SFT, reward, PPO and perhaps the judge) and sides (train, eval), without a leak.

The judge is a second reward model, trained on pairs that neither the first nor PPO has seen, so that it can tell
whether PPO got better or has only learnt to please the first.

A group goes to one phase and one side as a whole: to its home in the split ledger (`data_prep.ledger`), and else by a
hash of its name, so that the answer does not depend on what else is in the set.  The written files are read again at
the end: a group in two of them fails the step, and so does a prompt that is the same as, or near, one in another, or
that SFT learns an answer to in the middle of a conversation.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import dedup
from data_prep.groups import signatures, text_of
from data_prep.keys import fraction, inner_groups, prompt_group
from data_prep.ledger import SFT_ONLY, Group, Ledger, keys_of, read_groups
from data_prep.spread import Mapper
from data_prep.tables import PAIR_SCHEMA, iter_rows, table_writer

PHASES = ("sft", "reward", "ppo", "judge")
SIDES = ("train", "eval")
EVAL_KEYS = "eval-keys.arrow"
KEYS_SCHEMA = pa.schema([("group", pa.string()), ("keys", pa.list_(pa.uint64()))])


def phase_of(group: str, ratio: Sequence[float], seed: int) -> str:
    """The phase of a group's home: each gets its share of the ratio (SFT, reward, PPO and perhaps judge)."""
    if group.startswith(SFT_ONLY):
        return "sft"
    at = fraction("phase", str(seed), group) * sum(ratio)
    borders = list(accumulate(ratio))
    return next((PHASES[i] for i, border in enumerate(borders) if at < border), PHASES[len(ratio) - 1])


def split(
    blended: Path,
    phases: Sequence[float],
    eval_fraction: float,
    seed: int,
    out: Path,
    ledger: Path | None = None,
    mapped: Mapper = map,
) -> dict[str, Any]:
    """Write {phase}-{side}.arrow (`tables.PAIR_SCHEMA`) from train.arrow, test.arrow and groups.arrow of `blended`.

    phases: the ratio SFT : reward : PPO, with a fourth number for the judge.  eval_fraction: share of the new train
    groups held out in every phase; the sources' own test rows are all on the eval side, each in the phase of its group,
    and left out where the ledger says that their group was trained on.  ledger: its file, which is only read here;
    without one no group is known.  Beside the tables go the keys of their groups: {phase}-keys.npy (sorted uint64) of
    what the phase trains on, eval-keys.arrow (`KEYS_SCHEMA`) of what is held out.  Returns {phase: {side: {"rows",
    "groups"}}, "left_out": {"trained_before": test rows, "sft_only": SFT-only rows in groups of another phase}}.
    mapped: as in `blend`.  ValueError for a bad ratio or a file left empty, RuntimeError for a leak.
    """
    _check_ratio(phases, eval_fraction)
    names = PHASES[: len(phases)]
    groups = read_groups(blended)
    book = Ledger.read(ledger) if ledger else Ledger()
    homes = book.settle(groups, eval_fraction, seed)
    paths = {(phase, side): out / f"{phase}-{side}.arrow" for phase in names for side in SIDES}
    left_out = dict.fromkeys(("trained_before", "sft_only"), 0)
    with ExitStack() as stack:
        writers = {key: stack.enter_context(table_writer(path, PAIR_SCHEMA)) for key, path in paths.items()}
        for part in ("train", "test"):
            for row in iter_rows(blended / f"{part}.arrow"):
                home = homes[row["group"]]
                if part == "test" and not home.held_out:
                    left_out["trained_before"] += 1
                    continue
                phase = phase_of(home.name, phases, seed)
                if phase != "sft" and not row["rejected"]:
                    left_out["sft_only"] += 1
                    continue
                writers[phase, "eval" if home.held_out else "train"].append(row)
    for (phase, side), writer in writers.items():
        if not writer.rows:
            raise ValueError(
                f"The {side} rows of {phase} came out empty: add rows, or raise "
                + ("data.eval_fraction" if side == "eval" else f"the share of {phase} in data.phases")
                + (", or leave the judge out of data.phases." if phase == "judge" else ".")
            )
    written = {key: [row["group"] for row in iter_rows(path, ["group"])] for key, path in paths.items()}
    check_no_leak(written)
    check_no_prompt_leaks(paths, mapped)
    _write_keys(groups, written, out)
    counts = {
        phase: {side: {"rows": len(written[phase, side]), "groups": len(set(written[phase, side]))} for side in SIDES}
        for phase in names
    }
    return {**counts, "left_out": left_out}


def _write_keys(groups: Mapping[str, Group], written: Mapping[tuple[str, str], list[str]], out: Path) -> None:
    for (phase, side), names in written.items():
        if side == "train":
            np.save(out / f"{phase}-keys.npy", keys_of(groups, names))
    held_out = dict.fromkeys(name for (_, side), names in written.items() if side == "eval" for name in names)
    with table_writer(out / EVAL_KEYS, KEYS_SCHEMA) as writer:
        for name in held_out:
            writer.append({"group": name, "keys": groups[name].keys})


def _check_ratio(phases: Sequence[float], eval_fraction: float) -> None:
    if len(phases) not in (3, 4) or not all(0 < share < math.inf for share in phases):
        raise ValueError(
            f"data.phases is {list(phases)}; it has to be three or four numbers above 0 (SFT, reward, PPO, judge)."
        )
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"data.eval_fraction is {eval_fraction}; it has to be at least 0 and below 1.")


def check_no_leak(groups: Mapping[tuple[str, str], Iterable[str]]) -> None:
    """RuntimeError that names a group which stands in more than one of the files {(phase, side): its groups}."""
    home: dict[str, tuple[str, str]] = {}
    for key, names in groups.items():
        for name in names:
            other = home.setdefault(name, key)
            if other != key:
                raise RuntimeError(f"The group {name} leaks: it is in {'-'.join(other)} and in {'-'.join(key)}.")


def check_no_prompt_leaks(paths: Mapping[tuple[str, str], Path], mapped: Mapper = map) -> None:
    """RuntimeError that shows a prompt which is the same as, or near, one in another file of {(phase, side): file}, or
    the same as one that a conversation of SFT's train rows answers on its way.

    The groups that the rows name play no part: the prompts are read and compared anew.
    """
    home: dict[str, tuple[str, str]] = {}

    def new_prompts() -> Iterator[str]:
        for key, path in paths.items():
            for row in iter_rows(path, ["prompt"]):
                prompt = prompt_group(row["prompt"])
                if prompt not in home:
                    home[prompt] = key
                    yield text_of(row["prompt"])
                elif home[prompt] != key:
                    raise _prompt_leak(text_of(row["prompt"]), home[prompt], key)

    labels = dedup.clusters(signatures(new_prompts(), mapped))
    homes = list(home.values())
    for place, label in enumerate(labels):
        if homes[place] != homes[label]:
            raise _prompt_leak(_text(paths, list(home)[place]), homes[label], homes[place])
    learnt = ("sft", "train")
    for row in iter_rows(paths[learnt], ["prompt", "rejected"]):
        for inner in [] if row["rejected"] else inner_groups(row["prompt"]):
            if home.get(inner, learnt) != learnt:
                raise _prompt_leak(_text(paths, inner), learnt, home[inner])


def _text(paths: Mapping[tuple[str, str], Path], name: str) -> str:
    prompts = (row["prompt"] for path in paths.values() for row in iter_rows(path, ["prompt"]))
    return next(text_of(prompt) for prompt in prompts if prompt_group(prompt) == name)


def _prompt_leak(text: str, first: tuple[str, str], second: tuple[str, str]) -> RuntimeError:
    where = f"{'-'.join(first)} and in {'-'.join(second)}"
    return RuntimeError(f"A prompt leaks: it, or one that is near it, is in {where}: {text[:200]!r}")
