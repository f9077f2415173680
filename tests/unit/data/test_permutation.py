"""Permutations without a table: bijections, equal for an equal key, and even over orders and places."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.permutation import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**64))
def test_every_index_has_its_own_place(size: int, key: int) -> None:
    places = Permutation(size, key)(np.arange(size))
    assert sorted(places.tolist()) == list(range(size))
    assert np.array_equal(Permutation(size, key)(np.arange(size)[::-1]), places[::-1])  # one index needs no other


@given(st.integers(2**40, 2**50), st.integers(0, 2**32))
def test_large_sets_need_no_memory(size: int, first: int) -> None:
    places = Permutation(size, "name", 3)(np.arange(first, first + 100))
    assert len(set(places.tolist())) == 100
    assert places.min() >= 0
    assert places.max() < size


def test_small_sets_have_all_orders_equally_often() -> None:
    orders = Counter(tuple(Permutation(4, seed)(np.arange(4)).tolist()) for seed in range(1200))
    assert len(orders) == 24
    # chi-squared of 23 degrees of freedom: above 60 once in 30,000 sets of keys
    assert sum((count - 50) ** 2 / 50 for count in orders.values()) < 60


def test_the_order_is_that_of_earlier_runs() -> None:
    assert Permutation(10, 7, "", 1)(np.arange(10)).tolist() == [5, 9, 4, 8, 6, 7, 2, 0, 3, 1]
