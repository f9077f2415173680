"""Preemption: a stop at a step boundary, when a job is about to be preempted or has reached its time limit.

SIGUSR1, SIGTERM and SIGINT (Ctrl-C) may reach one rank or all of them, at any time. Each rank records the request; the
engine's all-reduce at the end of a step combines the requests (`StepOutcome.stop`), so that all ranks stop after the
same step. A second SIGINT ends the rank at once.
"""

import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Self

TERM_SECONDS = 20.0
"""Seconds that a rank may take from SIGTERM or SIGINT to the next step boundary before it exits.

Launchers kill a process after 30 s, and a rank that waits for a dead peer must not remain.
"""


STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager that receives `STOP_SIGNALS`; it does nothing outside the main thread.

    A thread reads the signal numbers that Python's C handler writes to a socket at once. A Python signal handler would
    run only after the main thread has returned from a collective, which may never happen.

    Attributes:
        wanted: True once a signal has been received.
    """

    def __init__(self, term_seconds: float = TERM_SECONDS) -> None:
        self.wanted = self._interrupted = False
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
        self._before = {signum: signal.signal(signum, _ignored) for signum in STOP_SIGNALS}
        # The entry script blocks SIGUSR1 until here: a pending one is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reached()
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        self._written.close()  # the thread reads end-of-file and returns
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def reached(self) -> None:
        """Cancel the exit after a signal, because all ranks have agreed to stop and may take time to save."""
        self._reached.set()

    def _listen(self, signals: socket.socket) -> None:
        with signals:
            while numbers := signals.recv(64):
                for number in numbers:
                    self._hear(number)

    def _hear(self, signum: int) -> None:
        if signum == signal.SIGINT and self._interrupted:
            os._exit(128 + signum)
        self._interrupted |= signum == signal.SIGINT
        if signum in (signal.SIGTERM, signal.SIGINT):
            threading.Thread(target=self._exit_unless_reached, args=(signum,), daemon=True).start()
        self.wanted |= signum in STOP_SIGNALS

    def _exit_unless_reached(self, signum: int) -> None:
        if not self._reached.wait(self._term_seconds):
            os._exit(128 + signum)


def _ignored(signum: int, frame: FrameType | None) -> None:
    """Do nothing: the thread of `StopSignals` handles the signal."""
