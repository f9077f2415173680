"""Balance of expert loads: the definitions on cases one can compute by hand, and what must hold for any counts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_dist.metrics import load_statistics


def test_equal_loads_are_perfect_balance() -> None:
    found = load_statistics([[7, 7, 7, 7]])
    assert (found.variance, found.cv2, found.max_over_mean) == (0.0, 0.0, 1.0)
    assert found.entropy == pytest.approx(1.0)


def test_all_on_one_expert() -> None:
    found = load_statistics([12, 0, 0, 0])
    assert found.variance == pytest.approx(3 / 16)  # shares 1, 0, 0, 0 about their mean of 1/4
    assert found.cv2 == pytest.approx(3.0)
    assert found.max_over_mean == pytest.approx(4.0)
    assert found.entropy == 0.0


def test_layers_are_averaged_and_idle_ones_left_out() -> None:
    found = load_statistics([[3, 1], [0, 0], [2, 2]])
    assert found.cv2 == pytest.approx(0.25 / 2)
    assert found.max_over_mean == pytest.approx((1.5 + 1.0) / 2)


def test_nothing_routed_is_not_a_number() -> None:
    assert math.isnan(load_statistics(np.zeros((2, 4))).cv2)


@pytest.mark.parametrize("counts", [[[1, -1]], np.ones((2, 2, 2)), np.ones((2, 0))])
def test_counts_that_are_none_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match="counts must be"):
        load_statistics(counts)  # type: ignore[arg-type]


@given(
    arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 16)), elements=st.integers(0, 1000)), st.integers(2, 9)
)
def test_statistics_do_not_depend_on_the_number_of_tokens_or_the_order(counts: np.ndarray, factor: int) -> None:
    if not counts.any():
        return
    found, more, turned = (load_statistics(c) for c in (counts, counts * factor, counts[:, ::-1]))
    experts = counts.shape[1]
    for other in (more, turned):
        assert other.cv2 == pytest.approx(found.cv2)
        assert other.entropy == pytest.approx(found.entropy)
    assert 0 <= found.cv2 <= experts - 1 + 1e-9
    assert found.variance == pytest.approx(found.cv2 / experts**2)
    assert 1 - 1e-9 <= found.max_over_mean <= experts + 1e-9
    assert -1e-9 <= found.entropy <= 1 + 1e-9
