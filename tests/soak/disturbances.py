"""Troubles that a run must survive: a suspension, a full disk, a removed folder, a second job, a clock that jumps."""

import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.ranks import start_ranks

WATCHDOG_SECONDS = 10
"""`watchdog.seconds` of runs that are suspended for longer."""


class Disturbance:
    """Trouble that begins `after` seconds of a life and lasts `seconds`; this one is none.

    Attributes:
        words: configuration of the life.
        loses_checkpoints: the run may have to start anew.
        may_stop: the life may end in one line, to be resumed.
        problem: what went wrong with the disturbance itself.
    """

    name = "none"
    words: tuple[str, ...] = ()
    loses_checkpoints = may_stop = False
    clock_offset = 0.0

    def __init__(self, after: float, seconds: float, run: Callable[[], Path | None]) -> None:
        self.after, self.seconds, self._run = after, seconds, run
        self.begun = self.ended = False
        self._life_began = self._begun_at = 0.0
        self.problem: str | None = None

    def poll(self, elapsed: float, processes: list[Any]) -> None:
        """Begin and end when it is time; called many times."""
        alive = [process for process in processes if process.is_alive()]
        self._life_began = self._life_began or time.time()
        if not self.begun and elapsed >= self.after and len(alive) == len(processes) and self.is_ready():
            self.begun, self._begun_at = True, elapsed
            self.begin(alive)
        if self.begun and not self.ended and elapsed >= self._begun_at + self.seconds:
            self.ended = True
            self.end(alive)

    def is_ready(self) -> bool:
        """Return True if the life has come so far that it can be disturbed."""
        return True

    def trains(self) -> bool:
        """Return True if this life has logged a step."""
        run = self._run()
        try:
            return run is not None and (run / "metrics.jsonl").stat().st_mtime > self._life_began
        except OSError:
            return False

    def begin(self, processes: list[Any]) -> None:
        """Disturb these processes."""

    def end(self, processes: list[Any]) -> None:
        """Undo it."""

    def settle(self) -> None:
        """Check the outcome after the life has ended."""


class Suspension(Disturbance):
    """SIGSTOP to all ranks for longer than the watchdog waits, then SIGCONT."""

    name = "suspended"
    words = (f"watchdog.seconds={WATCHDOG_SECONDS}",)

    def begin(self, processes: list[Any]) -> None:
        self.seconds = WATCHDOG_SECONDS + 4.0
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)

    def end(self, processes: list[Any]) -> None:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)


class FullDisk(Disturbance):
    """No file may grow for a while, as where a quota is used up (EFBIG in place of ENOSPC)."""

    name = "full disk"
    may_stop = True

    def is_ready(self) -> bool:
        return self.trains()  # before, torch's own file of the rendezvous would be cut off

    def begin(self, processes: list[Any]) -> None:
        self._limit(processes, 1)

    def end(self, processes: list[Any]) -> None:
        self._limit(processes, resource.RLIM_INFINITY)

    def _limit(self, processes: list[Any], size: int) -> None:
        for process in processes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class RemovedFolder(Disturbance):
    """The run's folder is removed."""

    name = "removed folder"
    loses_checkpoints = may_stop = True

    def is_ready(self) -> bool:
        return self.trains()

    def begin(self, processes: list[Any]) -> None:
        run = self._run()
        if run is None:
            self.loses_checkpoints = False
        else:
            shutil.rmtree(run, ignore_errors=True)  # files are made while it removes others


class SecondJob(Disturbance):
    """A second job of the same name, which must be refused."""

    name = "second job"

    def __init__(
        self,
        work: Callable[..., Any],
        words: list[str],
        after: float,
        seconds: float,
        run: Callable[[], Path | None],
    ) -> None:
        super().__init__(after, seconds, run)
        self._work, self._words = work, words
        self._processes: list[Any] = []

    def begin(self, processes: list[Any]) -> None:
        if self._run() is None:
            return  # the first job has no folder yet
        self._store = tempfile.TemporaryDirectory()
        self._processes, self._pipes = start_ranks(
            self._work, 2, Path(self._store.name) / "store", 60.0, self._words, None
        )

    def settle(self) -> None:
        if not self._processes:
            return
        deadline = time.monotonic() + 60
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        pipe = self._pipes[0]
        answer, error = pickle.loads(pipe.recv_bytes()) if pipe.poll() else (None, "no answer")  # noqa: S301  our own
        self._store.cleanup()
        if error and "is in use by another job" not in error:
            self.problem = f"the second job ended otherwise: {error.strip().splitlines()[-1]}"
        elif answer is not None and answer[1]:
            self.problem = "the second job was stopped"


class ClockJump(Disturbance):
    """The system's time jumps by a day, forward or back, a few times."""

    name = "clock jump"
    clock_offset = 86_400.0


def jumping_clock(offset: float) -> Callable[[], float]:
    """Return a replacement of `time.time` that jumps to and fro every 50 calls."""
    real, calls = time.time, 0

    def now() -> float:
        nonlocal calls
        calls += 1
        return real() + offset * (-1, 0, 1)[calls // 50 % 3]

    return now


KINDS: tuple[type[Any], ...] = (Suspension, FullDisk, RemovedFolder, SecondJob, ClockJump)
