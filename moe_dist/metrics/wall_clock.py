"""Wall time of a run by phase, from the start of the job's first process on this machine."""

import os
from itertools import pairwise
from pathlib import Path

from moe_dist.metrics.host import seconds_since_start

SUPERVISOR = "MOE_DIST_SUPERVISOR_PID"  # set by `moe-dist launch` (launch/faults.py)
PHASES = ("start", "prepare", "train", "end")


def job_seconds() -> float | None:
    """Return the age of this job here: of `moe-dist launch`, else of this process; None if not on Linux."""
    return seconds_since_start(Path(f"/proc/{os.environ.get(SUPERVISOR, 'self')}/stat"))


class WallClock:
    """Ends of a run's phases: start (processes, imports, rendezvous), prepare (data, model, checkpoint), train, end."""

    def __init__(self) -> None:
        self._ends = [job_seconds()]
        self.first_step: float | None = None

    def phase_ends(self, phase: str) -> None:
        """Note that a phase has ended now; only its first end counts."""
        if PHASES.index(phase) == len(self._ends):
            self._ends.append(job_seconds())

    def first_step_ends(self) -> None:
        """Note that the first step of this process is done."""
        self.first_step = self.first_step or job_seconds()

    def seconds(self) -> dict[str, float | None]:
        """Return the seconds of each phase, of the last one so far; None: not known."""
        ends = [0.0, *self._ends, job_seconds()]
        lengths = [None if a is None or b is None else b - a for a, b in pairwise(ends)]
        return dict(zip(PHASES, lengths, strict=False))
