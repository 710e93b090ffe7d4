"""A rank that counts: `python -m infra.rank counting_rank FOLDER`. It knows no torch, so it starts in no time.

SIGTERM makes it write how far it came and end with 75, as a training rank does. Begun without a checkpoint it counts on
and on; with one it counts three further and is done, and leaves in `done.RANK` where it went on from.
"""

import os
import signal
import sys
import time
from pathlib import Path

from whole_files import write

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
        write(FOLDER / f"counts.{RANK}", str(count))
        if stops:
            write(FOLDER / CHECKPOINT, str(count))
            print(f"rank {RANK} stopped at {count}")
            sys.exit(75)
        time.sleep(0.1)
    write(FOLDER / f"done.{RANK}", str(begin))


main()
