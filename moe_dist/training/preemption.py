"""Stopping at a step boundary because the system asks for it: a job about to be pre-empted, or at its time limit.

SIGUSR1 and SIGTERM reach some rank or all of them, at any moment. Each rank notes the wish here; the engine's one small
all-reduce of a step tells it to all (`StepOutcome.stop`), so that they stop after the same step and leave together.
"""

import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Self

TERM_SECONDS = 20.0
"""After SIGTERM, how long a rank may need to the next step boundary: another launcher kills it by 30 s anyway, and a
rank that waits for a peer that is gone must not live on."""


class StopSignals:
    """Listens to SIGUSR1 and SIGTERM while it is entered, in the main thread; elsewhere it hears nothing.

    A thread reads what Python's own C handler writes at once: a Python handler would have to wait until the main thread
    returns from a collective, which it may never do.
    """

    def __init__(self, term_seconds: float = TERM_SECONDS) -> None:
        self.wanted = False
        self._term_seconds = term_seconds
        self._reached = threading.Event()
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._written = theirs
        self._wakeup_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ours,), name="stop-signals", daemon=True).start()
        self._before = {signum: signal.signal(signum, _heard_by_thread) for signum in (signal.SIGUSR1, signal.SIGTERM)}
        # The entry script holds SIGUSR1 back until here: one that came meanwhile arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reached()
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        self._written.close()  # the thread reads the end, and ends
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def reached(self) -> None:
        """All ranks have agreed to stop: from now on they may take the time that saving needs."""
        self._reached.set()

    def _listen(self, signals: socket.socket) -> None:
        with signals:
            while numbers := signals.recv(64):
                for number in numbers:
                    self._hear(number)

    def _hear(self, signum: int) -> None:
        if signum == signal.SIGTERM:
            threading.Thread(target=self._leave_unless_reached, daemon=True).start()
        if signum in (signal.SIGTERM, signal.SIGUSR1):
            self.wanted = True

    def _leave_unless_reached(self) -> None:
        if not self._reached.wait(self._term_seconds):
            os._exit(128 + signal.SIGTERM)


def _heard_by_thread(signum: int, frame: FrameType | None) -> None:
    pass
