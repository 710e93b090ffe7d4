"""Who served when: every move of a policy's champion alias, kept as tags of the registered model in MLflow.

A move is written after the alias has moved, both under the registry's lock, under a key of its own that nobody writes
twice. So moves at the same time form one chain; and where a process dies between the two, or somebody moves the alias
in MLflow's own UI, alias and history disagree. The next who looks notices and records the move as one by hand. It
counts as a promotion: `previous` and rollback go by it.

The lock is a file: it holds off the processes that share a local store, or the workspace of a run on a server. From
several machines, let one deployment with a concurrency limit of 1 make all moves; a server has no lock that we could
take, and of two moves at once there the later one serves, with both recorded.
"""

import getpass
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from tasks import tracking
from tasks.tracking import CHAMPION, Store

PROMOTION, ROLLBACK, BY_HAND = "promotion", "rollback", "by hand"
PREFIX = "move."


@dataclass(frozen=True)
class Move:
    """The champion alias went from one version to another."""

    at: str
    """ISO 8601, UTC."""
    by: str
    kind: str
    """PROMOTION, ROLLBACK or BY_HAND."""
    before: int | None
    """The version that served before; None: none did."""
    after: int | None
    why: str


def moves(store: Store, name: str) -> list[Move]:
    """The recorded moves of a policy's champion alias, the oldest first."""
    tags = tracking.model_tags(store, name)
    return [Move(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(PREFIX)]


def noticed(store: Store, name: str) -> list[Move]:
    """The moves, with one that was made without us recorded as the last. Hold the registry's lock."""
    known = moves(store, name)
    champion = tracking.alias(store, name, CHAMPION)
    before, after = known[-1].after if known else None, champion.version if champion else None
    if before == after:
        return known
    return [*known, record(store, name, BY_HAND, before, after, "found moved, as in MLflow's own UI", by="unknown")]


def record(
    store: Store, name: str, kind: str, before: int | None, after: int | None, why: str, by: str | None = None
) -> Move:
    """Append a move that has been made. Hold the registry's lock."""
    now = datetime.now(UTC)
    move = Move(now.isoformat(timespec="seconds"), by or user(), kind, before, after, why)
    key = f"{PREFIX}{now:%Y%m%dT%H%M%S%f}.{secrets.token_hex(4)}"
    tracking.tag_model(store, name, {key: json.dumps(asdict(move))})
    return move


def previous(moves: Sequence[Move], existing: set[int]) -> int | None:
    """The version that a rollback goes to: what served before the present champion was made one.

    A rollback takes its promotion back, so that the next one goes further, and not back to what was found bad.
    """
    line: list[int | None] = []
    for move in moves:
        if move.kind == ROLLBACK and move.after in line:
            while line[-1] != move.after:
                line.pop()
        else:
            line.append(move.after)
    before = [version for version in line[:-1] if version in existing and version != line[-1]]
    return before[-1] if before else None


def user() -> str:
    """The name of who runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        return "unknown"
