"""Metrics of a stage while it trains: the worker tells the flow's process, which sends them."""

import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tasks.tracking.redaction import without_credentials
from tasks.tracking.store import connect, first_line, quiet

SECONDS_BETWEEN_FLUSHES = 2.0
SECONDS_TO_CLOSE = 5.0  # a run that is stopped has to end
WAITING_METRICS = 200_000  # beyond so many a dead server's metrics are let go; metrics.jsonl has them


class Tracker:
    """Logs a stage's metrics by step, from a thread of its own, so that nothing waits for MLflow's server.

    Processor, memory, disk, network and GPUs of this machine are logged beside them by MLflow's own monitor.

    Metrics are sent every two seconds and on `close`. What cannot be sent is tried again; training never fails for it:
    the first failure is told once on stderr, and `records/metrics.jsonl` has every value anyhow.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        quiet()
        self._uri, self._run_id = uri, run_id
        self._queue: queue.SimpleQueue[tuple[int, int, dict[str, float]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step; returns at once."""
        self._queue.put((time.time_ns() // 1_000_000, step, {name: float(value) for name, value in metrics.items()}))

    def close(self) -> None:
        """Send what is left; gives up after some seconds."""
        self._closing.set()
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"no answer in {SECONDS_TO_CLOSE:.0f} s"))

    def _work(self) -> None:
        waiting: list[Any] = []
        closing = False
        machine: Any = None
        while not closing:
            closing = self._closing.wait(SECONDS_BETWEEN_FLUSHES)
            try:
                machine = machine or _machine_monitor(self._uri, self._run_id)
                self._send(waiting)
            except Exception as error:  # whatever it is: training goes on
                self._warn(error)
                del waiting[:-WAITING_METRICS]
        if machine is not None:
            machine.finish()

    def _send(self, waiting: list[Any]) -> None:
        from mlflow.entities import Metric

        while not self._queue.empty():
            when, step, metrics = self._queue.get()
            waiting += [Metric(name, value, when, step) for name, value in metrics.items()]
        while waiting:
            connect(self._uri).log_batch(self._run_id, metrics=waiting[:1000])
            del waiting[:1000]

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            text = f"MLflow took no metrics ({first_line(error)}); training goes on, and records/metrics.jsonl has them"
            print(without_credentials(text), file=sys.stderr, flush=True)


def _machine_monitor(uri: str, run_id: str) -> Any:
    """MLflow's own watch over this machine, started: `system/...`, every ten seconds, from a thread of its own."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor
