"""How far a reproduction is and when it will end, by what its parts have taken so far."""

import time
from collections.abc import Callable, Mapping
from statistics import mean


class StudyProgress:
    """Counts down parts of several sorts.

    Attributes:
        left: parts of each sort that are still to run.
    """

    def __init__(self, left: Mapping[str, int], seconds: Mapping[str, float], say: Callable[[str], None]) -> None:
        """Args: seconds: what one of each sort takes, until one has been measured."""
        self.left, self._seconds, self._say = dict(left), dict(seconds), say
        self._taken: dict[str, list[float]] = {sort: [] for sort in left}
        self._total = sum(left.values())

    def run(self, sort: str, name: str, work: Callable[[], str]) -> None:
        """Does one part and says what `work` says of it, and how long the rest will take."""
        started = time.monotonic()
        told = work()
        self._taken[sort].append(time.monotonic() - started)
        self.left[sort] -= 1
        done = self._total - sum(self.left.values())
        self._say(f"{done}/{self._total} {sort} {name}: {told}; {self.remaining()}")

    def remaining(self) -> str:
        """In words."""
        seconds = sum(
            count * (mean(self._taken[sort]) if self._taken[sort] else self._seconds[sort])
            for sort, count in self.left.items()
        )
        return f"about {shown(seconds)} left" if any(self.left.values()) else "done"


def shown(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
