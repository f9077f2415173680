"""Watchdog: ends a run that makes no progress, after every rank has written the stacks of its threads.

Ranks work in lockstep, so a rank that hangs stops all others, and all watchdogs expire together. The stacks show the
rank that caused it: the others wait for it in a collective. A second watchdog, in C (faulthandler), covers a thread
that hangs without releasing the GIL.
"""

import faulthandler
import os
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
from moe_dist.errors import EXIT_FAILURE, TrainingError

STACKS = "stacks"
STACKS_SECONDS = 2.0
"""Seconds that a rank waits after writing its stacks, so that others can write theirs: losing a peer ends them."""
WAITING_SECONDS = 4.0
"""Seconds that a rank in a collective waits after writing its stacks, so that the hanging rank's error is first."""
LOCKED_SECONDS = 3.0
"""Seconds by which the watchdog in C expires after the one in Python."""
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/moe_dist/dispatch/all_to_all.py")


def watched_seconds(config: RunConfig) -> float:
    """Return `watchdog.seconds`, or its default."""
    seconds = config.watchdog.seconds
    return config.world.timeout_seconds / 2 if seconds is None else seconds


def end_process(error: Exception) -> None:
    """Print the error and end the process at once, since the main thread hangs."""
    print(f"moe-dist: error: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILURE)


class Watchdog(Callback):
    """Context manager and callback that watches the main thread.

    Args:
        seconds: longest time between two calls of `alive`; 0: disabled.
        run: folder of the run; stacks are written to `stacks/rank-00000.txt` and so on.
        give_up: called with the error; ends the process.
    """

    def __init__(self, seconds: float, run: Path, rank: int, give_up: Callable[[TrainingError], None]) -> None:
        self._seconds, self._rank, self._give_up = seconds, rank, give_up
        self._path = run / STACKS / f"rank-{rank:05}.txt"
        self._main = threading.main_thread().ident or 0
        self._doing, self._deadline = "start", 0.0
        self._ended, self._expired = threading.Event(), False
        self._file: TextIO | None = None

    def alive(self, doing: str) -> None:
        """Restart the timer before an operation of the main thread that must be shorter than `seconds`.

        Args:
            doing: description of the operation, for the error.
        """
        if not self._seconds:
            return
        self._doing, self._deadline = doing, time.monotonic() + self._seconds
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds + LOCKED_SECONDS, exit=True, file=self._file)

    def before_step(self, step: int) -> None:
        """Restart the timer."""
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
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
            self.alive("start")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._expired:
                self._path.unlink()
            with suppress(OSError):  # not empty: another rank wrote its stacks, or still runs
                self._path.parent.rmdir()

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        assert self._file is not None
        self._expired = True
        faulthandler.cancel_dump_traceback_later()  # the GIL is free: the watchdog in C is not needed
        self._file.write(f"rank {self._rank}: no progress for {self._seconds:g} s since {self._doing}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file)
        where, waits = self._place()
        if self._ended.wait(WAITING_SECONDS if waits else STACKS_SECONDS):
            return  # it continued, or failed with its own error
        what = "waits for another rank" if waits else "hangs"
        self._give_up(
            TrainingError(
                f"no progress for {self._seconds:g} s since {self._doing}: this rank {what} in {where}; the stacks of "
                f"all ranks are in {self._path.parent} (watchdog.seconds sets the time)"
            )
        )

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
