"""Schedule of re-clustering: rounds at growing intervals between a first and a last step."""

from moe_dist.config import ReclusterConfig


def is_due(step: int, recluster: ReclusterConfig) -> bool:
    """Return True if a round follows step `step`: start, start + T, start + T + gT, ..., up to `stop`."""
    return recluster.period is not None and step in _rounds_until(step, recluster.start, recluster)


def last_round(steps: int, recluster: ReclusterConfig) -> int:
    """Return the last step of a run of `steps` steps that a round follows; 0: there is no round."""
    return max(_rounds_until(steps, recluster.start, recluster), default=0) if recluster.period is not None else 0


def _rounds_until(step: int, first: int, recluster: ReclusterConfig) -> set[int]:
    assert recluster.period is not None
    last = min(step, recluster.stop or step)
    # values beyond the last step are clamped, since they may exceed the range of a float
    rounds, due, interval = set(), float(min(first, last + 1)), float(min(recluster.period, last + 1))
    while due <= last + 1 and round(due) <= last:
        rounds.add(round(due))
        due += interval
        interval *= recluster.growth
    return rounds
