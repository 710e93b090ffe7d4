"""Starts the processes of a training step and leaves none behind, whatever ends the flow.

    flow process (run) -> supervisor -> python -m infra.rank MODULE ...                       one process
                                     -> torchrun -> python -m infra.rank MODULE ...  x N      several
                                     -> deepspeed -> (as torchrun)
                                     -> infra.slurm -> srun ... python -m infra.rank MODULE ...

What a step prints goes to a log file and, line by line, to a callback. Four kinds of line are messages to the flow and
are not logged: `@progress {json}`; `@metrics {json}`; `@start {json}` with each rank's pid; and `@exit {json}`, with
which it tells its exit code (torchrun's own code is 1 whatever its ranks returned, and the flow has to tell 75,
stopped after a checkpoint, from a failure).

A step that says nothing for `launch.stall_seconds` is stalled: its ranks print their stacks, then it is stopped.

Where one of several ranks fails or is killed, the others may hang in a collective with it, and hear no SIGTERM of the
launcher, which gives them time for a checkpoint that cannot come. On one machine they are killed soon after.
"""

import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from infra.launchers import Launch, command, environment
from infra.leases import leased
from infra.owned import TOKEN, OwnedProcess, processes_with
from infra.supervisor import PR_SET_PDEATHSIG, descendants, is_alive, prctl, send

STOPPED = 75  # exit code of a rank that was asked to stop and has written a checkpoint: a retry resumes
TAIL_LINES = 40
PROGRESS = "@progress "
METRICS = "@metrics "
START = "@start "
EXIT = "@exit "
DUMP_SIGNAL = signal.SIGUSR2  # a rank answers it with the stacks of its threads
SECONDS_TO_DUMP = 3.0
SECONDS_WITHOUT_A_RANK = 5.0
"""For the ranks that are left to fail by themselves and say why."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: 0 done, 75 stopped after a checkpoint, 128 + signal killed, anything else failed."""

    exit_code: int
    tail: tuple[str, ...]  # the last lines of the log, up to the first rank's failure
    seconds: float
    stalled: bool = False  # it was stopped because it said nothing for `launch.stall_seconds`


def run(
    module: str,
    arguments: Sequence[str] = (),
    *,
    log: Path,
    launch: Launch | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    on_wait: Callable[[str], None] = print,
) -> Outcome:
    """Runs `python -m MODULE ARGUMENTS` in `launch.processes` processes and waits for the end.

    First it waits until its GPUs are free, which `on_wait` is told; they are leased until no process is left.

    Call it in the main thread, where KeyboardInterrupt and Prefect's TerminationSignal are raised: whatever is raised
    here or in a callback, the processes get SIGTERM and `grace_seconds` for a checkpoint, and all are gone when `run`
    returns or raises. A second Ctrl-C ends the grace. The callbacks run in the calling thread; while the processes
    are being stopped the log is written and only `on_metrics`, which must not raise, is called. The log is appended to,
    so an earlier attempt's stays.
    """
    launch = launch or Launch()
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    holder = f"process {os.getpid()}, which writes {log}"
    with leased(launch.gpus, launch.leases, holder=holder, on_wait=on_wait) as lease, log.open("ab") as log_file:
        process = OwnedProcess(
            command(launch, module, arguments, hostfile=log.with_suffix(".hosts")),
            env={**environment(launch, lease.gpus), **(env or {})},
            cwd=cwd,
            grace_seconds=launch.grace_seconds,
            keep=lease.descriptors,
        )
        output = _Output(process.stdout, log_file, on_line, on_progress, on_metrics)
        stalled = False
        whole_at = time.monotonic()
        try:  # an interrupt before this line loses `process`, whose pipe then closes, which stops the command too
            while process.exit_code is None and not stalled:
                output.read(0.2)
                stalled = output.silent_seconds() > launch.stall_seconds
                if not _has_lost_a_rank(output, launch):
                    whole_at = time.monotonic()
                elif time.monotonic() - whole_at > SECONDS_WITHOUT_A_RANK:
                    _kill_ranks(process, output)
            if stalled:
                _dump_stacks(process, output)
            while output.read(0):
                pass
        finally:
            output.mute()
            code = process.stop(output.read)
            while output.read(0):
                pass
            output.close()
    return Outcome(
        exit_code=overall_exit_code(code, output.rank_codes, launch.world_size),
        tail=tuple(output.tail),
        seconds=time.monotonic() - started,
        stalled=stalled,
    )


def _has_lost_a_rank(output: "_Output", launch: Launch) -> bool:
    """Whether one of several ranks failed, or ended without a word. Those of other machines are not seen."""
    if launch.processes == 1 or launch.nodes > 1 or launch.launcher == "slurm":
        return False
    failed = any(code not in (0, STOPPED) for code in output.rank_codes.values())
    return failed or any(not is_alive(pid) for rank, pid in output.pids.items() if rank not in output.rank_codes)


def _kill_ranks(process: OwnedProcess, output: "_Output") -> None:
    """Ends the ranks that are left, and what they have started; their launcher then ends by itself."""
    for rank in _own_ranks(process, output):
        for pid in (*descendants(rank), rank):
            send(pid, signal.SIGKILL)


def _own_ranks(process: OwnedProcess, output: "_Output") -> set[int]:
    """The pids of the ranks that live on this machine."""
    return set(processes_with(TOKEN, process.token)) & set(output.pids.values())


def _dump_stacks(process: OwnedProcess, output: "_Output") -> None:
    """Has the ranks of this machine print what they are doing into the log."""
    for pid in _own_ranks(process, output):
        send(pid, DUMP_SIGNAL)
        send(pid, signal.SIGCONT)  # one that was stopped answers only when it goes on
    give_up = time.monotonic() + SECONDS_TO_DUMP
    while time.monotonic() < give_up:
        output.read(0.1)


def overall_exit_code(launcher: int, ranks: Mapping[int, int], processes: int) -> int:
    """One exit code out of the launcher's and those that the ranks told (rank -> code).

    A failure tells more than the launcher's 1; "stopped after a checkpoint" counts only if every rank says so or was
    done, because a rank that says nothing was killed.
    """
    if launcher == 0:
        return 0
    failures = [code for code in ranks.values() if code not in (0, STOPPED)]
    if failures:
        return failures[0]
    if STOPPED in ranks.values() and len(ranks) == processes:
        return STOPPED
    return launcher


class _Output:
    """The merged output of a step, cut into lines: to the log, the tail and the callbacks."""

    def __init__(
        self,
        pipe: IO[bytes],
        log: IO[bytes],
        on_line: Callable[[str], None] | None,
        on_progress: Callable[[dict[str, Any]], None] | None,
        on_metrics: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.rank_codes: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self._heard = time.monotonic()
        self._pipe, self._log = pipe, log
        self._on_line, self._on_progress, self._on_metrics = on_line, on_progress, on_metrics
        self._partial = b""
        self._ended = False
        self._tail_is_done = False
        os.set_blocking(pipe.fileno(), False)

    def mute(self) -> None:
        """From here on only the log is written and metrics are handed on."""
        self._on_line = self._on_progress = None

    def silent_seconds(self) -> float:
        """How long nothing has come."""
        return time.monotonic() - self._heard

    def read(self, seconds: float) -> bool:
        """Takes what there is, waiting up to that time for it; False if there was nothing."""
        if self._ended:
            time.sleep(seconds)
            return False
        if not select.select([self._pipe], [], [], seconds)[0]:
            return False
        data = os.read(self._pipe.fileno(), 1 << 16)
        if not data:
            self._ended = True
            return False
        self._heard = time.monotonic()
        # What is not handed on yet stays in _partial: a callback may raise in the middle, and the rest is still logged.
        self._partial += data
        while b"\n" in self._partial:
            line, _, self._partial = self._partial.partition(b"\n")
            self._take(line)
        self._log.flush()
        return True

    def close(self) -> None:
        """Logs the unfinished last line of a process that was killed."""
        if self._partial:
            self._take(self._partial)
        self._pipe.close()

    def _take(self, raw: bytes) -> None:
        # As on a terminal, a carriage return writes the line anew: of a progress bar's states the last one stays.
        *rewritten, text = raw.decode(errors="replace").rstrip("\r").split("\r")
        message = _message(text)
        if message is None:
            self._log_line(text)
            return
        if rewritten and rewritten[-1]:
            self._log_line(rewritten[-1])  # what another rank had printed without a newline when the message came
        kind, fields = message
        if kind == EXIT:
            self.rank_codes[fields["rank"]] = fields["code"]
            # The reason stands above this line; torchrun's own forty lines about it would push it out of the tail.
            self._tail_is_done |= fields["code"] not in (0, STOPPED)
        elif kind == START:
            self.pids[fields["rank"]] = fields["pid"]
        elif kind == METRICS:
            if self._on_metrics is not None:
                self._on_metrics(fields)
        elif self._on_progress is not None:
            self._on_progress(fields)

    def _log_line(self, text: str) -> None:
        if not self._tail_is_done:
            self.tail.append(text)
        self._log.write(text.encode() + b"\n")
        if self._on_line is not None:
            self._on_line(text)


def _message(text: str) -> tuple[str, dict[str, Any]] | None:
    for kind in (PROGRESS, METRICS, START, EXIT):
        if text.startswith(kind):
            try:
                fields = json.loads(text[len(kind) :])
            except json.JSONDecodeError:
                return None  # two ranks wrote into each other: an ordinary line of the log
            return (kind, fields) if isinstance(fields, dict) else None
    return None


def report_progress(fields: Mapping[str, Any]) -> None:
    """Called in a rank: hands `fields` to the `on_progress` of the flow."""
    _tell(PROGRESS, fields)


def report_metrics(fields: Mapping[str, Any]) -> None:
    """Called in a rank: hands `fields` to the `on_metrics` of the flow."""
    _tell(METRICS, fields)


def report_start() -> None:
    """Called in a rank as the first thing: tells the flow which process it is."""
    _tell(START, {"rank": int(os.environ.get("RANK", "0")), "pid": os.getpid()})


def report_exit(code: int) -> None:
    """Called in a rank as the last thing: tells the flow the exit code that torchrun would hide."""
    _tell(EXIT, {"rank": int(os.environ.get("RANK", "0")), "code": code})


def _tell(kind: str, fields: Mapping[str, Any]) -> None:
    # One write, so that two ranks do not mix; the carriage return cuts off a progress bar that stands in this line.
    sys.stdout.flush()
    sys.stdout.write(f"\r{kind}{json.dumps(fields)}\n")
    sys.stdout.flush()


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Called in a rank: has the kernel send this signal to it when its parent (the launcher) dies.

    If the parent died before this call, the signal comes at once.
    """
    parent = os.getppid()
    prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent or _adopted(parent):
        os.kill(os.getpid(), number)


def _adopted(parent: int) -> bool:
    supervisor = int(os.environ.get("RLHF_SUPERVISOR", "0"))
    if not supervisor or os.environ["RLHF_LAUNCHER"] == str(os.getpid()):
        return False  # started by hand, or by the supervisor itself
    return parent in (1, supervisor)  # the two that take in the children of a dead launcher
