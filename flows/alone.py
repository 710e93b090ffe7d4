"""One process for a flow run.

Prefect's server does what an automation says at least once: where its database is busy it does it again. So a crashed
run may be scheduled twice, and be started by a worker a second time while the first start is at work.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from prefect import get_run_logger
from prefect.exceptions import Abort

SECONDS_TO_WAIT = 30.0
"""For the children of a killed run, which may hold what it held until they are ended too."""


@contextmanager
def alone(workspace: Path, flow_run_id: str) -> Iterator[None]:
    """This process is the only one of the flow run in the workspace; a second one ends here and changes nothing.

    Raises Prefect's Abort in the second, which leaves the run's state to the first.
    """
    path = _lock_of(workspace, flow_run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=SECONDS_TO_WAIT)
    except Timeout:
        get_run_logger().warning("This run was started twice; the first start goes on, this one ends.")
        raise Abort("The run is going on in another process.") from None
    try:
        yield
    finally:
        path.unlink()
        lock.release()


def died(workspace: Path, flow_run_id: str) -> bool:
    """Whether a process of a flow run was killed at work in the workspace, and no other goes on with it now."""
    path = _lock_of(workspace, flow_run_id)
    with suppress(OSError), path.open() as file:  # it is not there, or held
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.exists()  # who ends in order removes it before the lock is given back
    return False


def _lock_of(workspace: Path, flow_run_id: str) -> Path:
    return workspace / "running" / f"{flow_run_id}.lock"
