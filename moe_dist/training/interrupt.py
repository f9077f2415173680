"""Stopping at a step boundary because the system asks for it: a job about to be pre-empted, or at its time limit.

SIGUSR1 and SIGTERM reach some rank or all of them, at any moment. Each rank notes the wish here; the engine's one small
all-reduce of a step tells it to all (`StepOutcome.stop`), so that they stop after the same step, save and leave together.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

TERM_SECONDS = 20.0
"""After SIGTERM, how long a rank may need to the next step boundary: another launcher kills it by 30 s anyway, and a
rank that waits for a peer that is gone must not live on."""


class StopSignals:
    """Listens to SIGUSR1 and SIGTERM while it is entered, in the main thread; elsewhere it hears nothing."""

    def __init__(self, term_seconds: float = TERM_SECONDS) -> None:
        self.wanted = False
        self._term_seconds = term_seconds
        self._timer: threading.Timer | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGUSR1: self._note, signal.SIGTERM: self._terminate}
            self._before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
            # the entry script holds SIGUSR1 back until here: one that came meanwhile arrives now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reached()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def reached(self) -> None:
        """All ranks have agreed to stop: from now on they may take the time that saving needs."""
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.wanted = True

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        if self._timer is not None:
            _leave()  # asked a second time
        self.wanted = True
        self._timer = threading.Timer(self._term_seconds, _leave)
        self._timer.daemon = True
        self._timer.start()


def _leave() -> None:
    os._exit(128 + signal.SIGTERM)
