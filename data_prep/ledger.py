"""The split ledger: on which side each group stands, remembered from run to run.

Groups merge when rows arrive, and a merged group bears another name, so a hash of the name alone would move rows from
train to eval between two runs, and a champion would be judged on rows that it was trained on.  The ledger keeps, for
each key of a group (a prompt, a post), the group's *home*: the name that its phase is hashed from, and its side.  New
keys join the home of the known keys that they share a group with.  Where known homes meet, one is left: a train home
before an eval home (what was trained on never becomes an eval row; what was held out may become a train row), then the
smaller name.

A home is settled once: settling the same groups again, before or after others came, gives what the ledger says.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.keys import digest, fraction
from data_prep.tables import iter_rows, read_arrow

SIDES = ("train", "test")
_SCHEMA = pa.schema([("key", pa.uint64()), ("home", pa.string()), ("held_out", pa.bool_())])


class Home(NamedTuple):
    """Where a group belongs."""

    name: str
    held_out: bool


class Group(NamedTuple):
    """A group of the blended set."""

    keys: list[int]
    """`key_of` every name that was merged into it."""
    tested: bool
    """Whether a set holds rows of it out itself."""
    sft_only: bool = False
    """Whether nothing in it is compared, so that only SFT can use it."""


SFT_ONLY = "sft:"
"""Begins the home of such groups, which are of the SFT phase for ever."""


def key_of(name: str) -> int:
    """64 bits that name a prompt's or post's group before it was merged with others."""
    return int.from_bytes(digest(name)[:8], "big")


def is_held_out(group: str, eval_fraction: float, seed: int) -> bool:
    """Whether a group that no ledger knows goes to the eval side."""
    return fraction("side", str(seed), group) < eval_fraction


def read_groups(blended: Path) -> dict[str, Group]:
    """The groups of a blended set, by name (of train.arrow, test.arrow and the merged names in groups.arrow)."""
    rows: dict[str, set[str]] = {}
    compared: set[str] = set()
    for side in SIDES:
        table = read_arrow(blended / f"{side}.arrow", ["group", "rejected"])
        rows[side] = set(table["group"].to_pylist())
        compared |= set(table["group"].filter(pc.greater(pc.list_value_length(table["rejected"]), 0)).to_pylist())
    names = rows["train"] | rows["test"]
    groups = {name: Group([key_of(name)], name in rows["test"], name not in compared) for name in sorted(names)}
    for row in iter_rows(blended / "groups.arrow"):
        if row["group"] in groups:
            groups[row["group"]].keys.append(key_of(row["name"]))
    return groups


class Ledger:
    """The homes of all groups that were ever split in a workspace."""

    def __init__(self, home_of: Mapping[int, str] | None = None, held_out: Mapping[str, bool] | None = None) -> None:
        self._home_of = dict(home_of or {})
        self._held_out = dict(held_out or {})
        self.changed = False
        """Whether there is something to write."""

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """The ledger of a file, an empty one where there is none. ValueError for a damaged file."""
        if not path.exists():
            return cls()
        try:
            keys, homes, held_out = (column.to_pylist() for column in pq.read_table(path, schema=_SCHEMA).columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"The split ledger {path} cannot be read ({str(error).splitlines()[0]}): restore it, or delete it, and "
                "groups are dealt to train and eval anew."
            ) from error
        return cls(dict(zip(keys, homes, strict=True)), dict(zip(homes, held_out, strict=True)))

    def write(self, path: Path) -> None:
        """Write the ledger whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = sorted(self._home_of)
        homes = [self._home_of[key] for key in keys]
        columns = [keys, homes, [self._held_out[home] for home in homes]]
        half_written = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(pa.table(columns, schema=_SCHEMA), half_written)
        half_written.replace(path)

    def came_of(self, older: "Ledger") -> bool:
        """Whether all that the older one knows is known here, and nothing it trains on is held out."""
        return all(
            key in self._home_of and self._held_out[self._home_of[key]] <= older._held_out[home]
            for key, home in older._home_of.items()
        )

    def settle(self, groups: Mapping[str, Group], eval_fraction: float, seed: int) -> dict[str, Home]:
        """The home of every group; what is new or merged is in the ledger from now on (`write` keeps it)."""
        several = (group.keys for group in groups.values() if len(group.keys) > 1)
        self._merge({self._home_of[key] for key in keys if key in self._home_of} for keys in several)
        homes = {}
        for name, group in sorted(groups.items()):
            new = [key for key in group.keys if key not in self._home_of]
            if len(new) == len(group.keys):
                home = SFT_ONLY * group.sft_only + name
                self._held_out[home] = group.tested or is_held_out(name, eval_fraction, seed)
            else:
                home = next(self._home_of[key] for key in group.keys if key in self._home_of)
            if new:
                self._home_of.update(dict.fromkeys(new, home))
                self.changed = True
            homes[name] = Home(home, self._held_out[home])
        return homes

    def _merge(self, met: Iterable[set[str]]) -> None:
        """Make one of the homes in each set, and of sets that share one."""
        merged: dict[str, str] = {}

        def winner(home: str) -> str:
            while home in merged:
                home = merged[home]
            return home

        for homes in met:
            if len(homes) > 1:
                first, *others = sorted({winner(home) for home in homes}, key=lambda home: (self._held_out[home], home))
                merged |= dict.fromkeys(others, first)
        if merged:
            self.changed = True
            self._home_of = {key: winner(home) for key, home in self._home_of.items()}


def admit(path: Path, blended: Path, eval_fraction: float, seed: int) -> None:
    """Keep the homes of a blended set's groups in the ledger's file, which has to be locked."""
    ledger = Ledger.read(path)
    ledger.settle(read_groups(blended), eval_fraction, seed)
    if ledger.changed:
        ledger.write(path)


def follow(path: Path, other: bytes) -> None:
    """Replace the ledger's file by another machine's that came of it. ValueError where both went on, apart.

    One came of the other if it knows all its keys and holds nothing out that the other trains on. Where this one came
    of the other, it stays.
    """
    if path.exists() and path.read_bytes() == other:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fetched = path.with_name(f".{path.name}.fetched.{os.getpid()}")
    fetched.write_bytes(other)
    try:
        mine, theirs = Ledger.read(path), Ledger.read(fetched)
        if theirs.came_of(mine):
            fetched.replace(path)
        elif not mine.came_of(theirs):
            raise ValueError(
                f"the split ledgers of {path.parent} and of the remote have both grown, apart, so that one might train "
                "on what the other holds out; take another workspace, or another address"
            )
    finally:
        fetched.unlink(missing_ok=True)


def digest_of(homes: Mapping[str, Home]) -> str:
    """16 hex digits that name what `Ledger.settle` said: the part of a split's identity that the ledger decides."""
    parts = (part for name, home in sorted(homes.items()) for part in (name, home.name, str(home.held_out)))
    return digest(*parts).hex()[:16]


def keys_of(groups: Mapping[str, Group], names: Iterable[str]) -> np.ndarray:
    """The keys of the named groups, sorted. [keys] uint64."""
    return np.unique(np.array([key for name in names for key in groups[name].keys], dtype=np.uint64))
