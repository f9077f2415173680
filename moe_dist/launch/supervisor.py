"""Supervisor of one launcher command and its ranks: when one fails all stop, and the last line names it and its error.

DeepSpeed's and torch's launchers stop the other ranks themselves. But neither reports in one line which rank was first
and why, both may wait long for a rank that ignores signals, and DeepSpeed's returns 0 when its own helper is killed.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moe_dist.errors import EXIT_FAILURE, EXIT_STOPPED, LaunchError
from moe_dist.launch import faults
from moe_dist.launch.environment import INIT_METHOD
from moe_dist.launch.fork_server import fork_server
from moe_dist.launch.processes import group_runs, wait_status, was_terminated

POLL_SECONDS = 0.1
GRACE_SECONDS = 6.0  # time for the launcher to stop the other ranks after a failure
SIGNAL_SECONDS = {  # time for the ranks to react to a forwarded signal
    signal.SIGINT: 25.0,  # to save a checkpoint
    signal.SIGTERM: 25.0,  # the same; many systems kill what still runs after 30 s
}
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TERMINATE_SECONDS = 4.0  # between SIGTERM and SIGKILL
LAUNCHER_SECONDS = 0.5  # time for the launcher to end after its ranks; DeepSpeed's takes seconds
SHOW_CURSOR = "\x1b[?25h"
STOPPED = "stopped by a signal, with a checkpoint"


@dataclass(frozen=True)
class JobOutcome:
    """End of a job, or of its part on one machine.

    Attributes:
        exit_code: 0 if every rank is done; 75 if they stopped by a signal; the exit code of the rank that failed first;
            130 after Ctrl-C, 143 after SIGTERM.
        line: last line for the user; empty after success.
        fault: the first fault that is no consequence of another, else the first.
    """

    exit_code: int
    line: str = ""
    fault: faults.Fault | None = None


def run_job(
    command: Sequence[str],
    environment: Mapping[str, str],
    ranks: Sequence[int],
    *,
    rendezvous_file: bool,
    fork_ranks: bool = False,
) -> JobOutcome:
    """Run a launcher's command until it and all its ranks have ended; leave no process behind.

    Args:
        command: words of the launcher's command, run without a shell.
        environment: complete environment of the command.
        ranks: ranks that must report success.
        rendezvous_file: the ranks use a file in the job's folder for rendezvous instead of a TCP port.
        fork_ranks: ranks are forked from a process that imports torch once (`fork_server.py`).

    Raises:
        LaunchError: the kernel offers no way to watch processes.
    """
    _require_pidfd()
    with tempfile.TemporaryDirectory(prefix="moe-dist-", ignore_cleanup_errors=True) as name:
        variables = {**environment, faults.JOB_FOLDER: name, faults.SUPERVISOR: str(os.getpid())}
        if rendezvous_file:
            variables[INIT_METHOD] = f"file://{name}/rendezvous"
        job = _SupervisedJob(Path(name), ranks)
        server: AbstractContextManager[dict[str, str]] = nullcontext({})
        if fork_ranks:
            server = fork_server(Path(name), variables)
        with _forward_signals(job), server as found:
            try:
                job.start(command, variables | found)
                job.watch()
            finally:
                job.stop()
        return job.conclude()


def _require_pidfd() -> None:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        raise LaunchError(
            f"`moe-dist launch` watches ranks by pidfd_open, which this system lacks ({error}): use Linux 5.3 or "
            "later, or start ranks with deepspeed or torchrun directly"
        ) from error


@contextmanager
def _forward_signals(job: "_SupervisedJob") -> Iterator[None]:
    def handle(signum: int, frame: FrameType | None) -> None:
        job.receive(signum)

    before = {signum: signal.signal(signum, handle) for signum in FORWARDED_SIGNALS}
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, FORWARDED_SIGNALS
    )  # the caller may have blocked them; pending ones are delivered now
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass(frozen=True)
class _Rank:
    """Running rank; `descriptor` is its pidfd, which always refers to this very process."""

    rank: int
    pid: int
    descriptor: int


class _SupervisedJob:
    """Running command with the ranks that it has started so far, and the faults seen."""

    def __init__(self, folder: Path, ranks: Sequence[int]) -> None:
        self._folder = folder
        self._unregistered = set(ranks)
        self._running: dict[int, _Rank] = {}
        self._unfinished = set(ranks)
        self._stopped = self._dismissed = False
        self._groups: set[int] = set()
        self._faults: list[faults.Fault] = []
        self._signal: int | None = None
        self._forwarded: int | None = None
        self._deferred: list[int] | None = None
        self._deadline: float | None = None
        self._poller = select.poll()
        self._launcher: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # A session of its own: only the supervisor gets Ctrl-C, and one process group holds launcher and ranks.
        self._launcher = subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._groups.add(self._launcher.pid)

    def receive(self, signum: int) -> None:
        """Forward a signal to the ranks; SIGHUP, or a second signal that ends jobs, ends this one at once.

        SIGUSR1 asks the ranks to stop at their next step, without a time limit.
        """
        if self._deferred is not None:
            self._deferred.append(signum)
            return
        if signum == signal.SIGUSR1:
            self._forward(signum)
            return
        gently = self._signal is None and signum in SIGNAL_SECONDS and self._any_rank_runs()
        self._signal = self._signal or signum
        self._deadline = time.monotonic() + (SIGNAL_SECONDS[signal.Signals(signum)] if gently else 0.0)
        if gently:
            self._forward(signum)

    def _any_rank_runs(self) -> bool:
        """Return whether a rank runs, or has registered since the last poll and will get the signal when found."""
        return bool(self._running) or any((self._folder / f"rank-{rank}.pid").exists() for rank in self._unregistered)

    @contextmanager
    def _signals_deferred(self) -> Iterator[None]:
        """Keep signals until the end of a `with`; blocking them would not do, since another thread may receive them."""
        self._deferred = []
        try:
            yield
        finally:
            kept, self._deferred = self._deferred, None
            for signum in kept:
                self.receive(signum)

    def _forward(self, signum: int) -> None:
        self._forwarded = signum
        for rank in self._running.values():
            _send(rank, signum)

    def watch(self) -> None:
        """Wait until the launcher has ended, its deadline is over, or all ranks are done and it takes too long."""
        while self._launcher is not None and self._launcher.poll() is None:
            self._poll(POLL_SECONDS)
            if not self._unfinished and not self._dismissed:
                self._dismissed, self._deadline = True, time.monotonic() + LAUNCHER_SECONDS
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return
        self._dismissed = False
        self._poll(0.0)

    def stop(self) -> None:
        """End all remaining processes, first by SIGTERM, then by SIGKILL; a launcher without ranks at once."""
        for signum in (signal.SIGKILL,) if self._dismissed else (signal.SIGTERM, signal.SIGKILL):
            for group in self._groups:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signum)
            deadline = time.monotonic() + TERMINATE_SECONDS
            while self._any_process_runs() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 2)

    def conclude(self) -> JobOutcome:
        """Return the outcome of the job."""
        assert self._launcher is not None
        code = 0 if self._dismissed else self._launcher.wait()
        if code == 0 and not self._unfinished:
            if self._stopped:
                return JobOutcome(EXIT_STOPPED, STOPPED)
            if self._signal is None:
                return JobOutcome(0)
        if sys.stdout.isatty():  # rank 0 may have been killed during its live display
            sys.stdout.write(SHOW_CURSOR)
            sys.stdout.flush()
        if self._signal is not None:
            return JobOutcome(128 + self._signal, "interrupted")
        fault = faults.root_cause(self._faults)
        if fault is None:
            missing = (
                f"without rank {', '.join(map(str, sorted(self._unfinished)))}"
                if self._unfinished
                else "after its ranks"
            )
            line = f"error: the launcher ended {missing}, exit code {code}"
            return JobOutcome(code if code > 0 else EXIT_FAILURE, line)
        return JobOutcome(fault.exit_code or EXIT_FAILURE, f"rank {fault.rank} failed: {fault.line}", fault)

    def _poll(self, seconds: float) -> None:
        with self._signals_deferred():  # one that came while a rank is noted would reach it twice, or never
            for rank in sorted(self._unregistered):
                self._find(rank)
        ended = [self._running.pop(descriptor) for descriptor, _ in self._poller.poll(seconds * 1000)]
        statuses = {rank: wait_status(rank.descriptor, rank.pid) for rank in ended}
        # Several may end between two polls: ranks ended by SIGTERM followed from the first failure.
        for one in sorted(ended, key=lambda each: was_terminated(statuses[each])):
            self._ended(one.rank, one.pid, statuses[one])
            self._poller.unregister(one.descriptor)
            os.close(one.descriptor)

    def _find(self, number: int) -> None:
        try:
            entry = json.loads((self._folder / f"rank-{number}.pid").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        self._unregistered.discard(number)
        self._groups.add(entry["group"])
        try:
            rank = _Rank(number, entry["pid"], os.pidfd_open(entry["pid"]))
        except ProcessLookupError:
            self._ended(number, entry["pid"], status=None)
            return
        self._running[rank.descriptor] = rank
        self._poller.register(rank.descriptor, select.POLLIN)
        if self._forwarded is not None:
            _send(rank, self._forwarded)

    def _ended(self, rank: int, pid: int, status: int | None) -> None:
        if (ending := faults.read_done(self._folder, rank)) is not None:
            self._unfinished.discard(rank)
            self._stopped |= ending == faults.STOPPED
            return
        self._faults.append(faults.read_fault(self._folder, rank) or _killed(rank, pid, status, first=not self._faults))
        self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS

    def _any_process_runs(self) -> bool:
        if self._launcher is not None:
            self._launcher.poll()
        return any(group_runs(group) for group in self._groups)


def _send(rank: _Rank, signum: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(rank.descriptor, signum)


def _killed(rank: int, pid: int, status: int | None, *, first: bool) -> faults.Fault:
    """Return the fault of a rank that ended without a status file.

    Args:
        status: exit status as of `os.wait`; None if it is not available.
        first: no rank had failed before; otherwise SIGTERM is how the launcher ends the others.
    """
    if status is None:
        return faults.Fault(rank, time.time(), f"process {pid} was killed", EXIT_FAILURE)
    if os.WIFSIGNALED(status):
        signum = os.WTERMSIG(status)
        line = f"process {pid} was killed by signal {signum} ({signal.Signals(signum).name})"
        consequence = was_terminated(status) and not first
        return faults.Fault(rank, time.time(), line, 128 + signum, consequence)
    code = os.WEXITSTATUS(status)
    return faults.Fault(rank, time.time(), f"process {pid} ended with exit code {code}", code)
