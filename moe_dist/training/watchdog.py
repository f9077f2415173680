"""Watchdog: ends a run that makes no progress, after every rank has written the stacks of its threads.

Ranks work in lockstep, so a rank that hangs stops all others, and all watchdogs expire together. The stacks show the
rank that caused it: the others wait for it in a collective. A second guard, a process (`hang_guard.py`), covers a
thread that hangs without releasing the GIL.

Time in which the process did not run is no hang: a job that is suspended and continued goes on. A thread that ticks
measures it, since its ticks have a gap there.
"""

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from moe_dist.config import RunConfig
from moe_dist.engine.callback import Callback
from moe_dist.errors import TrainingError
from moe_dist.training.hang_guard import end_process

STACKS = "stacks"
STACKS_SECONDS = 2.0
"""Seconds that a rank waits after writing its stacks, so that others can write theirs: losing a peer ends them."""
WAITING_SECONDS = 4.0
"""Seconds that a rank in a collective waits after writing its stacks, so that the hanging rank's error is first."""
LOCKED_SECONDS = 3.0
"""Seconds by which the guard process expires after the thread."""
LONGEST_TICK = 2.0
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/moe_dist/dispatch/all_to_all.py")
GUARD = Path(__file__).with_name("hang_guard.py")


def watched_seconds(config: RunConfig) -> float:
    """Return `watchdog.seconds`, or its default."""
    seconds = config.watchdog.seconds
    return config.world.timeout_seconds / 2 if seconds is None else seconds


class Pauses:
    """Measurement of the time in which this process did not run, by the gaps between ticks.

    Args:
        tick: seconds between ticks.
        clock: monotonic time in seconds.
    """

    def __init__(self, tick: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.tick, self._clock, self._before = tick, clock, clock()

    def take(self) -> float:
        """Return the seconds by which this tick is late; called once a tick."""
        now = self._clock()
        late, self._before = now - self._before - self.tick, now
        return max(0.0, late)


class Watchdog(Callback):
    """Context manager and callback that watches the main thread.

    Args:
        seconds: longest time between two calls of `alive`; 0: disabled.
        run: folder of the run; stacks are written to `stacks/rank-00000.txt` and so on.
        give_up: called with the error by a thread of this process; ends it.
        guard_gives_up: module-level function for the same in the guard process.
        events: file to which the guard process appends the event `failed`; None: none.
        on_pause: called in the main thread with the seconds in which the process did not run.
    """

    def __init__(
        self,
        seconds: float,
        run: Path,
        rank: int,
        give_up: Callable[[TrainingError], None],
        guard_gives_up: Callable[[Exception], None] = end_process,
        events: Path | None = None,
        on_pause: Callable[[float], None] | None = None,
    ) -> None:
        self._seconds, self._rank, self._give_up = seconds, rank, give_up
        self._path = run / STACKS / f"rank-{rank:05}.txt"
        self._main = threading.main_thread().ident or 0
        self._doing, self._deadline, self._step = "start", 0.0, 0
        self._ended, self._expired = threading.Event(), False
        self._file: TextIO | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._guard_gives_up, self._events, self._on_pause = guard_gives_up, events, on_pause
        self._tick, self._paused = min(LONGEST_TICK, seconds / 10), 0.0

    def alive(self, doing: str) -> None:
        """Restart the timer before an operation of the main thread that must be shorter than `seconds`.

        Args:
            doing: description of the operation, for the error.
        """
        if not self._seconds:
            return
        self._doing, self._deadline = doing, time.monotonic() + self._seconds
        paused, self._paused = self._paused, 0.0
        if paused >= max(1.0, self._seconds / 2) and self._on_pause is not None:
            self._on_pause(paused)
        self._beat()

    def before_step(self, step: int) -> None:
        """Restart the timer."""
        self._step = step - 1
        self.alive(f"step {step}")

    def before_evaluation(self, step: int) -> None:
        """Restart the timer."""
        self.alive(f"the evaluation after step {step}")

    def stop(self, step: int) -> None:
        """Restart the timer."""
        self.alive("the checkpoint before a stop")

    def finish(self, step: int) -> None:
        """Restart the timer."""
        self.alive("the end of the run")

    def __enter__(self) -> Self:
        if self._seconds:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
            except OSError:
                self._file = None  # a full disk ends no training: the stacks go to standard error
            self.alive("start")
            self._arm()
            self._start_guard()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if not self._seconds:
            return
        faulthandler.cancel_dump_traceback_later()
        self._end_guard()
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
                if not self._expired:
                    self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()  # not empty: another rank wrote its stacks, or still runs

    def _watch(self) -> None:
        pauses = Pauses(self._tick)
        while not self._ended.wait(self._tick):
            late = pauses.take()
            if late > self._tick:
                self._deadline += late
                self._paused += late
                self._forget_stacks()
            self._arm()
            self._beat()
            if time.monotonic() > self._deadline:
                self._expire()
                return

    def _expire(self) -> None:
        self._expired = True
        faulthandler.cancel_dump_traceback_later()  # the GIL is free: the guard process is not needed
        self._end_guard()
        where, waits = self._place()
        written = self._write_stacks()
        if self._ended.wait(WAITING_SECONDS if waits else STACKS_SECONDS):
            return  # it continued, or failed with its own error
        what = "waits for another rank" if waits else "hangs"
        stacks = f"the stacks of all ranks are in {self._path.parent}" if written else "its stacks are above"
        self._give_up(
            TrainingError(
                f"no progress for {self._seconds:g} s since {self._doing}: this rank {what} in {where}; {stacks} "
                "(watchdog.seconds sets the time)"
            )
        )

    def _write_stacks(self) -> bool:
        """Write the stacks to their file, or to standard error if that fails; return True for the file."""
        try:
            if self._file is None or not self._path.exists():  # the folder was removed
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
            self._file.write(f"rank {self._rank}: no progress for {self._seconds:g} s since {self._doing}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file)
        except OSError:
            faulthandler.dump_traceback(2)
            return False
        return True

    def _forget_stacks(self) -> None:
        """Remove stacks that the timer in C has written because the process did not run."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            with suppress(OSError, ValueError):
                os.ftruncate(self._file.fileno(), 0)
                os.lseek(self._file.fileno(), 0, os.SEEK_SET)

    def _arm(self) -> None:
        """Restart the timer in C that writes the stacks if the interpreter does not run."""
        with suppress(OSError, ValueError):  # closed at the end of the run
            if not self._ended.is_set():
                faulthandler.dump_traceback_later(self._seconds, file=2 if self._file is None else self._file)

    def _beat(self) -> None:
        """Tell the guard process that the interpreter runs, and what it does."""
        guard = self._guard
        if guard is not None and guard.stdin is not None:
            with suppress(OSError, ValueError):  # a guard that was killed
                os.write(guard.stdin.fileno(), f"{self._step} {self._doing}\n".encode())

    def _start_guard(self) -> None:
        settings = {
            "seconds": self._seconds,
            "limit": self._seconds + LOCKED_SECONDS,
            "tick": self._tick,
            "stacks": str(self._path),
            "events": None if self._events is None else str(self._events),
            "give_up": f"{self._guard_gives_up.__module__}:{self._guard_gives_up.__qualname__}",
        }
        with suppress(OSError):  # no process is left: the thread guards alone
            self._guard = subprocess.Popen(
                [sys.executable, str(GUARD), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            assert self._guard.stdin is not None
            os.set_blocking(self._guard.stdin.fileno(), False)

    def _end_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        guard.kill()
        guard.wait()
        assert guard.stdin is not None
        with suppress(OSError):
            guard.stdin.close()

    def _place(self) -> tuple[str, bool]:
        """Return the main thread's position in the code, and True if it is inside a collective."""
        frame = sys._current_frames().get(self._main)
        where, waits = "a place unknown", False
        while frame is not None:
            file = frame.f_code.co_filename
            waits = waits or any(part in file for part in COLLECTIVES)
            if "/moe_dist/" in file and where == "a place unknown":
                where = f"{Path(file).name}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return where, waits
