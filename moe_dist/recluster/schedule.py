"""When experts are regrouped: from a first step on, at growing intervals, until the structure freezes."""

from moe_dist.config import ReclusterConfig


def is_due(step: int, recluster: ReclusterConfig) -> bool:
    """Whether a round follows step `step`: start, start + T, start + T + gT, ..., up to `stop`."""
    return recluster.period is not None and step in _rounds_until(step, recluster.start, recluster)


def last_round(steps: int, recluster: ReclusterConfig) -> int:
    """The last step of a run of `steps` that a round follows; 0: none does."""
    return max(_rounds_until(steps, recluster.start, recluster), default=0) if recluster.period is not None else 0


def _rounds_until(step: int, first: int, recluster: ReclusterConfig) -> set[int]:
    assert recluster.period is not None
    last = min(step, recluster.stop or step)
    # what lies beyond the end needs no exact figure, and may be more than a float can hold
    rounds, due, interval = set(), float(min(first, last + 1)), float(min(recluster.period, last + 1))
    while due <= last + 1 and round(due) <= last:
        rounds.add(round(due))
        due += interval
        interval *= recluster.growth
    return rounds
