"""Progress of a reproduction and its remaining time, from the durations of its finished parts."""

import time
from collections.abc import Callable, Mapping
from statistics import mean


class StudyProgress:
    """Countdown of parts of several sorts.

    Attributes:
        left: remaining parts of each sort.
    """

    def __init__(
        self, left: Mapping[str, int], seconds: Mapping[str, float], say: Callable[[str], None], jobs: int = 1
    ) -> None:
        """Start the countdown.

        Args:
            seconds: assumed duration of one part of each sort, until one has been measured.
            jobs: parts that are run at a time.
        """
        self.left, self._seconds, self._say, self._jobs = dict(left), dict(seconds), say, jobs
        self._taken: dict[str, list[float]] = {sort: [] for sort in left}
        self._total = sum(left.values())

    def run(self, sort: str, name: str, work: Callable[[], str]) -> None:
        """Run one part, and report the line that `work` returns with the remaining time."""
        started = time.monotonic()
        told = work()
        self._taken[sort].append(time.monotonic() - started)
        self.left[sort] -= 1
        done = self._total - sum(self.left.values())
        self._say(f"{done}/{self._total} {sort} {name}: {told}; {self.remaining()}")

    def remaining(self) -> str:
        """Return the remaining time in words."""
        seconds = sum(
            count * (mean(self._taken[sort]) if self._taken[sort] else self._seconds[sort])
            for sort, count in self.left.items()
        )
        return f"about {shown(seconds / self._jobs)} left" if any(self.left.values()) else "done"


def shown(seconds: float) -> str:
    """Format a duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
