"""The guard drops what does harm and keeps the rest; rounds come when the configuration says."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import ReclusterConfig
from moe_dist.recluster.guard import accept
from moe_dist.recluster.schedule import is_due, last_round


@given(st.lists(st.integers(0, 10), max_size=12), st.integers(0, 10))
def test_what_is_accepted_is_within_the_limit(harms: list[int], limit: int) -> None:
    changes = list(enumerate(harms))
    tried: list[int] = []

    def harm(some: Sequence[tuple[int, int]]) -> float:
        tried.append(len(some))
        return float(sum(cost for _, cost in some))

    made = accept(changes, harm, limit)
    assert sum(cost for _, cost in made) <= limit
    assert set(made) <= set(changes)
    assert len(made) == len(set(made))
    if sum(harms) <= limit:
        assert made == changes
        assert len(tried) <= 1, "harmless changes are tried once, all together"
    assert all(change in made for change in changes if change[1] == 0)


def test_a_loss_that_is_no_number_is_harm() -> None:
    made = accept(["good", "bad"], lambda some: math.nan if "bad" in some else 0.0, 0.01)
    assert made == ["good"]


def _rounds(steps: int, **keys: object) -> list[int]:
    recluster = ReclusterConfig.model_validate(keys)
    return [step for step in range(1, steps + 1) if is_due(step, recluster)]


def test_intervals_grow_until_the_structure_freezes() -> None:
    assert _rounds(400, period=20, start=20, growth=2) == [20, 40, 80, 160, 320]
    assert _rounds(100, period=20, start=10, growth=1, stop=70) == [10, 30, 50, 70]
    assert _rounds(100, period=3, start=1, growth=1.5) == [1, 4, 8, 15, 25, 41, 63, 98]
    assert _rounds(100) == []


def test_intervals_beyond_all_measure_end_the_rounds() -> None:
    assert _rounds(30, period=2, start=1, growth=1e308) == [1, 3]
    assert _rounds(30, period=2**63 - 1, start=1) == [1]
    assert _rounds(30, period=2, start=2**63 - 1) == []
    assert last_round(30, ReclusterConfig.model_validate({"period": 2, "growth": 1e308})) == 22


@given(st.integers(1, 50), st.integers(1, 50), st.floats(1, 3), st.integers(1, 200))
def test_the_last_round_is_the_last_that_is_due(period: int, start: int, growth: float, steps: int) -> None:
    keys = {"period": period, "start": start, "growth": growth}
    due = _rounds(steps, **keys)
    assert last_round(steps, ReclusterConfig.model_validate(keys)) == max(due, default=0)
    assert len(due) == len(set(due))
