"""A rank that counts: `python -m infra.rank counting_rank FOLDER`. It knows no torch, so it starts in no time.

SIGTERM makes it write how far it came and end with 75, as a training rank does. Begun without a checkpoint it counts on
and on; with one it counts three further and is done, and leaves in `done.RANK` where it went on from.
"""

import os
import signal
import sys
import time
from pathlib import Path

FOLDER, RANK = Path(sys.argv[1]), os.environ["RANK"]
CHECKPOINT = f"checkpoint.{RANK}"


def main() -> None:
    """Counts ten a second, until the end or until it is stopped."""
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
    begin = int((FOLDER / CHECKPOINT).read_text()) if (FOLDER / CHECKPOINT).exists() else None
    count = begin or 0
    while begin is None or count < begin + 3:
        count += 1
        write(f"counts.{RANK}", count)
        if stops:
            write(CHECKPOINT, count)
            print(f"rank {RANK} stopped at {count}")
            sys.exit(75)
        time.sleep(0.1)
    write(f"done.{RANK}", begin)


def write(name: str, value: int | None) -> None:
    """Whole or not at all: the test reads while we write."""
    draft = FOLDER / f".{name}"
    draft.write_text(str(value))
    draft.replace(FOLDER / name)


main()
