"""Runs srun and ends its step gracefully: `python -m infra.slurm srun ...`.

srun answers SIGTERM by killing the ranks, and leaves them alone when it is killed itself. So SIGTERM here reaches the
ranks as SIGUSR1, which srun passes on and a rank takes for SIGTERM; and what still runs shortly before the supervisor
would kill us, srun is told to kill.
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

STOP_SIGNAL = signal.SIGUSR1
SECONDS_TO_KILL = 3.0  # Slurm needs them to end a step


def main(command: list[str]) -> int:
    """Runs the command line of srun and returns its exit code, 128 + signal after a signal."""
    # A session of its own, as the supervisor's SIGTERM goes to our whole group; it is ended with the descendants.
    step = subprocess.Popen(command, start_new_session=True)
    asked_at: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not asked_at:
            asked_at.append(time.monotonic())
            step.send_signal(STOP_SIGNAL)

    signal.signal(signal.SIGTERM, stop)
    patience = max(0.0, float(os.environ.get("RLHF_GRACE_SECONDS", "0")) - SECONDS_TO_KILL)
    while step.poll() is None:
        if asked_at and time.monotonic() > asked_at[0] + patience:
            step.terminate()
        time.sleep(0.1)
    return step.returncode if step.returncode >= 0 else 128 - step.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
