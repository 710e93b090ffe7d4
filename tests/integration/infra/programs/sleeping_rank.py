"""A rank that only sleeps: `python -m infra.rank sleeping_rank MODE FOLDER`, tells by files in FOLDER."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from whole_files import write

MODE, FOLDER, RANK = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]


def checkpoint(number: int, frame: object) -> None:
    """Takes half a second, as writing one does, and doesn't mind being told twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.5)
    (FOLDER / f"checkpoint.{RANK}").touch()
    print(f"rank {RANK} wrote its checkpoint")
    sys.exit(75)


def main() -> None:
    """Says that it is ready, then does what MODE says."""
    if MODE == "graceful":
        signal.signal(signal.SIGTERM, checkpoint)
    elif MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # A child in a session of its own, which inherits the ignored SIGTERM.
        subprocess.Popen(["sleep", "300"], start_new_session=True)
        signal.signal(signal.SIGTERM, lambda number, frame: (FOLDER / f"told.{RANK}").touch())
    print(f"rank {RANK} is ready")
    write(FOLDER / f"ready.{RANK}", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if MODE == "done":
        sys.exit(0)
    if MODE == "fails" and RANK == "0":
        while len(list(FOLDER.glob("ready.*"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.05)  # or the other rank's words come after the failure
        time.sleep(0.2)
        print("the reason of the failure")
        sys.exit(3)
    if MODE == "leaves":
        subprocess.Popen(["sleep", "300"], start_new_session=True)
        sys.exit(0)
    if MODE == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(300)


main()
