"""What runs first in every process of a step: `python -m infra.rank MODULE ARGUMENTS` runs MODULE as `__main__`.

It ties the process to its launcher, prints line by line, and tells the flow the exit code.
"""

import faulthandler
import io
import os
import runpy
import select
import signal
import sys
import threading
import time
import traceback

from infra.launch import die_with_parent, report_exit


def main() -> None:
    """Runs the module that the command line names; exits as it does."""
    _end_with_the_launcher(float(os.environ.get("RLHF_GRACE_SECONDS", "0")))
    faulthandler.enable()  # a crash in native code leaves the Python stack in the log
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
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
