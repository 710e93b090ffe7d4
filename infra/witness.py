"""Stays behind a run and tells Prefect how it ended, where neither the run nor its worker had the time to.

    with witnessed():         # in a flow, around all its work
        ...

A killed run cannot say so; a worker that is stopped kills its runs without a word; and a run that no worker started is
heard by nobody when it is cancelled in the UI: the block looks for that, and ends the run as SIGTERM does. Where the
whole machine dies, the witness does too: then the heartbeats' end tells (`flows.deployments`).
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from uuid import UUID

from infra.owned import TOKEN

ENDED, CANCELLED = "ended", "cancelled"
SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_FOR_THE_WORKER = 3.0  # it tells the end of a run that it outlives, and knows more of it


@contextmanager
def witnessed() -> Iterator[None]:
    """The flow run of this process has a witness until it ends; a cancel of one without a worker is heard."""
    from prefect.runtime import deployment, flow_run
    from prefect.settings import PREFECT_API_URL

    deployed = deployment.id is not None
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.witness", str(flow_run.id), str(flow_run.run_count), str(deployed)],
        env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # a worker waits until nobody holds the output of its run any more
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    over, cancelled = threading.Event(), threading.Event()
    if not deployed:
        looks = copy_context().run  # the thread shall ask the server that this run is on
        threading.Thread(target=looks, args=(_heed_cancel, flow_run.id, over, cancelled), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if cancelled.is_set():
            process.stdin.write(CANCELLED)
            process.stdin.flush()
        elif isinstance(error, Exception) or not deployed:
            _dismiss(process)
        raise  # else a worker that is being stopped may kill us before the state is told
    else:
        _dismiss(process)
    finally:
        over.set()


def _dismiss(process: subprocess.Popen[str]) -> None:
    process.communicate(ENDED)


def _heed_cancel(run_id: str, over: threading.Event, cancelled: threading.Event) -> None:
    """Ends this process as SIGTERM does once somebody cancels the run."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            with suppress(Exception):  # a server that is busy or down is no reason to end a run
                state = client.read_flow_run(UUID(run_id)).state
                if state is not None and state.is_cancelling():
                    cancelled.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return


def main(run_id: str, count: str, deployed: str) -> None:
    """Waits for the end of the process that holds the other end of stdin, then tells of it if need be."""
    if TOKEN not in os.environ:  # below a supervisor of ours, that of `rlhf serve`, there is another one who tells
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a stop of all processes at once is what there is to tell of
    said = sys.stdin.read()
    if said == ENDED:
        return
    if deployed == str(True):
        time.sleep(SECONDS_FOR_THE_WORKER)
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled, Crashed

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(run_id))
        if run.state is None or run.run_count != int(count):
            return  # it has been started again already
        if said == CANCELLED or run.state.is_cancelling():
            message = "It was cancelled; what is finished stays, and so does its last checkpoint."
            client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
        elif run.state.is_running():
            message = "Its process was killed, or its worker was stopped. It goes on from its last checkpoint."
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
