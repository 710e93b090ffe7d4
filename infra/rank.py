"""What runs first in every process of a step: `python -m infra.rank MODULE ARGUMENTS` runs MODULE as `__main__`.

It ties the process to its launcher, prints line by line, tells the flow its pid and its exit code, and then ends at
once. SIGUSR2 has it print the stacks of all its threads. Under Slurm it takes its place among the ranks from Slurm's
variables.
"""

import atexit
import faulthandler
import io
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback

from infra.launch import DUMP_SIGNAL, die_with_parent, report_exit, report_start
from infra.launchers import VISIBLE
from infra.slurm import STOP_SIGNAL


def main() -> None:
    """Runs the module that the command line names; exits as it does."""
    code = 1
    atexit.register(lambda: _end_at_once(code))  # the first to be registered is called last
    if "SLURM_PROCID" in os.environ:
        _join_slurm_step()
    else:
        _end_with_the_launcher(float(os.environ.get("RLHF_GRACE_SECONDS", "0")))
    if VISIBLE in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[VISIBLE]
    faulthandler.enable()  # a crash in native code leaves the Python stack in the log
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        # One write a line, or ranks mix within it: under PYTHONUNBUFFERED Python writes text and newline apart.
        stream.reconfigure(line_buffering=True, write_through=False)
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    report_start()
    code = _run(module)
    report_exit(code)
    sys.exit(code)


def _run(module: str) -> int:
    # What Python prints about an exception is printed here, so that it stands in the log before the exit code is told.
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end_at_once(code: int) -> None:
    """Exit without Python's own clearing up, in which a thread of gloo that still holds a tensor aborts the process.

    All would be done, and the step yet count as killed. Destroying the group does not help: DeepSpeed keeps hold of it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join_slurm_step() -> None:
    """Rank and address as torchrun would set them; Slurm's daemon ends the rank when the step ends."""
    slurm = os.environ
    hosts = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True).stdout.split()
    os.environ |= {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "MASTER_ADDR": hosts[0],
    }
    # srun passes SIGTERM on as SIGKILL, so infra.slurm asks by another one.
    signal.signal(STOP_SIGNAL, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))


def _end_with_the_launcher(grace_seconds: float) -> None:
    """When the launcher dies: SIGTERM, for a checkpoint; SIGKILL after the grace, as a rank may hang in a collective.

    The supervisor does the same; this is for the case that it was killed as well.
    """
    launcher = os.pidfd_open(os.getppid())
    die_with_parent(signal.SIGTERM)

    def kill_when_late() -> None:
        select.select([launcher], [], [])
        time.sleep(grace_seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill_when_late, name="launcher-watch", daemon=True).start()


if __name__ == "__main__":
    main()
