"""The guard drops what does harm and keeps the rest; rounds come when the configuration says."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import ReclusterConfig
from moe_dist.recluster.guard import accept, make_guarded
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


class Trial:
    """Transition of named moves whose loss is a base plus the harms of those that are applied."""

    def __init__(self, base: float, harms: dict[str, float]) -> None:
        self.base, self.harms = base, harms
        self.applied: list[str] = []
        self.committed: list[str] | None = None

    def apply(self, moves: Sequence[str]) -> None:
        assert not self.applied, "trials are reverted before the next one"
        self.applied = list(moves)

    def revert(self) -> None:
        self.applied = []

    def commit(self, moves: Sequence[str]) -> None:
        assert not self.applied, "trials are reverted before the moves are made"
        self.committed = list(moves)

    def loss(self) -> float:
        return self.base + sum(self.harms[move] for move in self.applied)


@pytest.mark.parametrize(
    ("base", "harm", "limit", "made"),
    [(8.0, 0.4, 0.06, True), (8.0, 0.4, 0.04, False), (0.125, 0.0125, 0.08, False), (0.125, 0.0125, 0.12, True)],
)
def test_the_limit_is_relative_to_the_loss_before(base: float, harm: float, limit: float, made: bool) -> None:
    trial = Trial(base, {"move": harm})
    moves, increase = make_guarded(["move"], trial, trial.loss, limit)
    assert (moves == ["move"]) is made, f"{harm} more than {base} is {harm / base:.0%} more; the limit is {limit:.0%}"
    assert trial.committed == moves
    assert increase == pytest.approx(harm / base if made else 0.0)


def test_moves_that_harm_are_dropped_and_the_increase_is_that_of_the_others() -> None:
    trial = Trial(2.0, {"a": 0.1, "b": 1.0, "c": -0.2, "d": 0.02})
    moves, increase = make_guarded(["a", "b", "c", "d"], trial, trial.loss, 0.06)
    assert moves == trial.committed == ["a", "c", "d"]
    assert increase == pytest.approx((0.1 - 0.2 + 0.02) / 2)


def test_nothing_to_move_needs_no_loss() -> None:
    trial = Trial(0.0, {})
    assert make_guarded([], trial, lambda: 1 / 0, 0.1) == ([], 0.0)
    assert trial.committed == []


def test_a_round_after_the_last_step_is_none() -> None:
    recluster = ReclusterConfig(period=5, start=5, growth=1)
    assert [last_round(steps, recluster) for steps in (4, 5, 9, 10)] == [0, 5, 5, 10]
