"""The process that stands between the flow and a command it starts, so that nothing outlives the flow.

    python -I -S supervisor.py --owner PID --grace SECONDS -- COMMAND...

Whatever ends the owner, kill -9 included, the supervisor sees it (its stdin reaches its end, or the owner's pidfd
becomes readable) and takes the command down: SIGTERM, `--grace` seconds for a checkpoint, SIGKILL. SIGTERM, SIGINT
and SIGHUP to the supervisor do the same; SIGUSR1 ends the grace. It is a child subreaper, so a rank whose launcher
died, and which has a session of its own, is still among its descendants.
It runs by path, with the standard library alone, because it must be up in milliseconds and must not depend on
what the flow has installed.

Exit code: the command's own, 128 + signal if a signal ended it, 127 if it could not be started.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HURRY_SIGNAL = (
    signal.SIGUSR1
)  # not a second SIGTERM: systemd and Slurm send one to every process, the owner's stop apart
HANDLED = (*STOP_SIGNALS, HURRY_SIGNAL)
STDIN = 0
LEFT_BEHIND_SECONDS = 3.0  # what outlives a command that ended by itself has no work left that is worth a long wait
UNKILLABLE_SECONDS = 5.0  # a process in the kernel's D state dies only when its system call returns


def prctl(option: int, value: int) -> None:
    """Calls prctl(2); OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def descendants(root: int, spare: Callable[[int], bool] = lambda pid: False) -> list[int]:
    """The live processes below `root`; zombies are left out, and so is what stands below a process to `spare`."""
    children: dict[int, list[tuple[int, str]]] = {}
    for pid, parent, state in _processes():
        children.setdefault(parent, []).append((pid, state))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += [pid for pid, state in below if state not in "ZX"]
        queue += [
            pid for pid, _ in below if not spare(pid)
        ]  # a zombie leader may still have live threads with children of their own
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs, or could; a zombie does not."""
    found = _parent_and_state(pid)
    return found is not None and found[1] not in "ZX"


def _processes() -> Iterator[tuple[int, int, str]]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := _parent_and_state(int(name))) is not None:
            yield int(name), *found


def _parent_and_state(pid: int) -> tuple[int, str] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]  # the name before ")" may hold anything
    except OSError:
        return None  # it has ended
    return int(parent), state.decode()


def is_supervisor(pid: int) -> bool:
    """Whether a process runs this very file."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsencode(os.path.abspath(__file__)) in file.read().split(b"\0")[:5]
    except OSError:
        return False


def send(pid: int, number: int) -> None:
    """Signals a process that may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Supervisor:
    """Runs one command and ends it; `main` below is the only user."""

    def __init__(self, owner: int, grace: float) -> None:
        self.grace = grace
        self.deadline: float | None = None  # set once a stop is asked for; past it everything is killed
        self.launcher = 0
        self.code: int | None = None
        self.wake, wake_end = os.pipe()  # a signal writes a byte, so that the poll returns
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_end, False)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: self.ask_to_stop())
        signal.signal(HURRY_SIGNAL, self._hurry)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the thread that forked us may have blocked some
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.poll = select.poll()
        for descriptor in (self.wake, STDIN, *_pidfd(owner)):
            self.poll.register(descriptor, select.POLLIN)
        if os.getppid() != owner:
            self.ask_to_stop()

    def _hurry(self, number: int, frame: FrameType | None) -> None:
        self.deadline = 0.0

    def ask_to_stop(self) -> None:
        """Starts the grace; asking again changes nothing."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace

    def start(self, command: list[str]) -> None:
        """Forks the command, in a session of its own."""
        supervisor = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)  # our handlers must not swallow a signal in the child
        self.launcher = os.fork()
        if self.launcher == 0:
            _become(command, supervisor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def wait_for_command(self) -> None:
        """Returns when the command has ended, or when a stop was asked for and the grace is over."""
        told = False
        while self.code is None and not self._late():
            if self.deadline is not None and not told:
                self._tell_command_to_stop()
                told = True
            self._wait(self.deadline)

    def clear(self) -> list[int]:
        """Ends what is left below us: SIGTERM while there is time, then SIGKILL. Returns what even that did not end."""
        if self.deadline is None:
            self.deadline = time.monotonic() + min(self.grace, LEFT_BEHIND_SECONDS)
        told: set[int] = set()
        # What another supervisor is over hears of the stop from that one: a second SIGTERM has torchrun kill its ranks
        # in the middle of their checkpoints.
        while not self._late() and (alive := descendants(os.getpid(), is_supervisor)):
            for pid in alive:
                if pid not in told:
                    send(pid, signal.SIGTERM)
            told.update(alive)
            self._wait(min(self.deadline, time.monotonic() + 0.1))
        give_up = time.monotonic() + UNKILLABLE_SECONDS
        while (alive := descendants(os.getpid())) and time.monotonic() < give_up:
            for pid in alive:  # again and again: a process may have forked between the listing and its end
                send(pid, signal.SIGKILL)
            self._wait(time.monotonic() + 0.02)
        self._reap()
        return alive

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _tell_command_to_stop(self) -> None:
        try:
            os.killpg(self.launcher, signal.SIGTERM)  # it leads its session, so its pid is its group's
        except ProcessLookupError:
            send(self.launcher, signal.SIGTERM)  # forked, but not past setsid yet

    def _wait(self, until: float | None) -> None:
        """Sleeps until something happens, or until that time, and takes note of it."""
        timeout = None if until is None else max(0, int((until - time.monotonic()) * 1000) + 1)
        for descriptor, _ in self.poll.poll(timeout):
            if descriptor == self.wake:
                os.read(self.wake, 4096)
            elif descriptor != STDIN or not os.read(STDIN, 4096):
                self.ask_to_stop()
                self.poll.unregister(descriptor)
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.launcher:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code


def _pidfd(owner: int) -> list[int]:
    # Stdin alone would not do: a process that the owner forked without exec keeps the pipe open after its death.
    try:
        return [os.pidfd_open(owner)]
    except OSError:
        return []  # an owner that is dead already shows in getppid; on an old kernel stdin has to do


def _become(command: list[str], supervisor: int) -> None:
    """In the forked child: turns into the command. Never returns."""
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # kill -9 of the supervisor must reach the launcher too
        if os.getppid() != supervisor:
            os._exit(128 + signal.SIGTERM)
        os.dup2(os.open(os.devnull, os.O_RDONLY), STDIN)  # the owner's pipe is the supervisor's alone
        os.environ["RLHF_SUPERVISOR"] = str(supervisor)  # by these two a rank sees that its parent died early
        os.environ["RLHF_LAUNCHER"] = str(os.getpid())
        for number in (*HANDLED, signal.SIGPIPE):  # Python ignores SIGPIPE, and exec would hand that on
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127)


def main(arguments: list[str]) -> int:
    """Runs the command line of the module docstring and returns the exit code."""
    split = arguments.index("--")
    options = dict(zip(arguments[:split:2], arguments[1:split:2], strict=True))
    supervisor = Supervisor(int(options["--owner"]), float(options["--grace"]))
    if supervisor.deadline is not None:
        return 128 + signal.SIGTERM  # the owner died before the command was started
    supervisor.start(arguments[split + 1 :])
    supervisor.wait_for_command()
    stuck = supervisor.clear()
    if stuck:
        print(f"supervisor: even SIGKILL does not end the processes {stuck}", file=sys.stderr, flush=True)
    return 128 + signal.SIGKILL if supervisor.code is None else supervisor.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
