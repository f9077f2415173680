"""Order of a blend: by hand, and by drawing one after the other (`test_megatron_files.py`: Megatron-core's index)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data.blend import RESOLUTION, BlendPlan, Cycle, whole_weights

WEIGHTS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 1.0, 2.0, 7.5]), min_size=3, max_size=3).filter(any)


def brute_force(
    changes: list[tuple[int, list[float]]], limits: list[int | None], positions: int
) -> list[tuple[int, int]]:
    """The definition, one position after the other."""
    drawn, since, counted = [0] * len(limits), 0, [0] * len(limits)
    found: list[tuple[int, int]] = []
    weights: list[int] = []
    for position in range(positions):
        begins = [given for first, given in changes if first <= position][-1]
        live = [0.0 if limit is not None and drawn[k] >= limit else begins[k] for k, limit in enumerate(limits)]
        if not any(live):
            return found
        if position in dict(changes) or list(whole_weights(live)) != weights:
            weights, since, counted = list(whole_weights(live)), position, [0] * len(limits)
        behind = [w * max(position - since, 1) - sum(weights) * c for w, c in zip(weights, counted, strict=True)]
        source = max((k for k in range(len(limits)) if weights[k]), key=lambda k: (behind[k], -k))
        found.append((source, drawn[source]))
        drawn[source] += 1
        counted[source] += 1
    return found


def test_a_cycle_by_hand() -> None:
    # 2 : 1 : 1. The largest goes first; then each is one quarter or more behind in turn.
    plan = BlendPlan([(0, [0.5, 0.25, 0.25])], [None] * 3)
    sources, draws = plan.locate(np.arange(8))
    assert sources.tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    assert draws.tolist() == [0, 0, 0, 1, 2, 1, 1, 3]
    assert plan.drawn(6) == (3, 2, 1)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 40), WEIGHTS), max_size=2),
    WEIGHTS,
    st.lists(st.one_of(st.none(), st.integers(0, 20)), min_size=3, max_size=3),
)
def test_any_position_is_that_of_drawing_one_after_the_other(
    later: list[tuple[int, list[float]]], first: list[float], limits: list[int | None]
) -> None:
    changes = [(0, first), *sorted(dict(later).items())]
    expected = brute_force(changes, limits, 80)
    plan = BlendPlan(changes, limits)
    assert plan.end == (len(expected) if len(expected) < 80 else plan.end)
    for position in reversed(range(len(expected))):  # in any order
        source, draw = plan.locate(np.array([position]))
        assert (int(source[0]), int(draw[0])) == expected[position]
        assert plan.drawn(position) == tuple(
            sum(source == k for source, _ in expected[:position]) for k in range(len(limits))
        )


def test_weights_become_whole_numbers() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([3, 0, 1.5]) == (2, 0, 1)
    assert whole_weights([1e-9, 1.0]) == (1, RESOLUTION - 1)
    rounded = whole_weights([0.1234567, 0.7654321, 0.5])
    assert sum(rounded) == RESOLUTION
    for whole, exact in zip(rounded, [0.1234567, 0.7654321, 0.5], strict=True):
        assert abs(whole / RESOLUTION - exact / 1.3888888) < 1 / RESOLUTION


def test_a_position_far_away_is_found_at_once() -> None:
    plan = BlendPlan([(0, [0.5, 0.5]), (10**14, [1.0, 3.0])], [None, 10**15])
    assert plan.drawn(10**14 + 4) == (5 * 10**13 + 1, 5 * 10**13 + 3)
    assert plan.locate(np.array([10**14]))[1].tolist() == [5 * 10**13]
    assert plan.end is None


def test_sources_that_run_out_give_their_part_to_the_others() -> None:
    plan = BlendPlan([(0, [1.0, 1.0])], [None, 3])
    assert plan.locate(np.arange(9))[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert [segment.first for segment in plan.segments] == [0, 6]
    assert BlendPlan([(0, [1.0, 1.0])], [4, 3]).end == 7
    assert plan.shares(0) == (0.5, 0.5)
    assert plan.shares(100) == (1.0, 0.0)
    assert Cycle((2, 1)).position_of(1, 5) == 3 * 5 + int(np.flatnonzero(Cycle((2, 1)).later_cycle == 1)[0])
