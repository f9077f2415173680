"""Process beside a rank that ends it when its interpreter no longer runs: a thread that hangs and keeps the GIL.

Only another process can print the error then, and record it. It counts the time in which the rank was able to run, by
ticks of its own: a rank that is stopped (SIGSTOP, a debugger, a frozen container) does not hang. It imports only the
standard library, and ends with the rank.
"""

import importlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from moe_dist.errors import EXIT_FAILURE, TrainingError


def end_process(error: Exception) -> None:
    """Print the error and end the process at once, since the main thread hangs."""
    print(f"moe-dist: error: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILURE)


def wait_for_hang(rank: int, seconds: float, tick: float) -> str | None:
    """Read beats of a rank from standard input until it ends (None) or sends nothing for `seconds`.

    Returns:
        The operation that the last beat names.
    """
    doing, silent, before = "start", 0.0, time.monotonic()
    while silent < seconds:
        ready, _, _ = select.select([0], [], [], tick)
        now = time.monotonic()
        gap, before = now - before, now
        if ready:
            beats = os.read(0, 65536)
            if not beats:
                return None
            lines = beats.decode(errors="replace").splitlines()
            doing, silent = lines[-1], 0.0
        elif os.getppid() != rank:
            return None
        elif not _is_stopped(rank):
            silent += min(gap, 2 * tick)  # a longer gap: this process was suspended as well
    return doing


def _is_stopped(pid: int) -> bool:
    """Return True if a process is stopped by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _give_up(settings: dict[str, Any], error: TrainingError) -> None:
    """Record the error as an event, and report it as the rank would."""
    if settings["events"] is not None:
        line = {"event": "failed", "step": settings["step"], "time": time.time(), "error": str(error)}
        try:
            with open(settings["events"], "a", encoding="utf-8") as events:
                events.write(json.dumps(line) + "\n")
        except OSError as problem:
            print(f"{settings['events']} cannot be written: {problem.strerror}", file=sys.stderr, flush=True)
    reporter = os.fork()
    if reporter == 0:
        module, _, function = settings["give_up"].partition(":")
        try:
            getattr(importlib.import_module(module), function)(error)
        finally:
            end_process(error)
    os.waitpid(reporter, 0)


def main() -> None:
    """Guard the process that started this one; the argument is a JSON object of settings."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # a rank may save its state after them; this process ends with it
    settings, rank = json.loads(sys.argv[1]), os.getppid()
    beat = wait_for_hang(rank, settings["limit"], settings["tick"])
    if beat is None:
        return
    settings["step"], _, doing = beat.partition(" ")
    settings["step"] = int(settings["step"]) if settings["step"].isdecimal() else 0
    error = TrainingError(
        f"no progress for {settings['seconds']:g} s since {doing}: this rank hangs outside of Python's code, and keeps "
        f"the interpreter's lock; its stacks are in {settings['stacks']} (watchdog.seconds sets the time)"
    )
    try:
        _give_up(settings, error)
    finally:
        os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    main()
