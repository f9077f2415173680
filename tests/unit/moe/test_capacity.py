"""Capacity: who is kept, against a plain loop."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.moe.capacity import capacity_of, within_capacity


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 8))
def test_the_first_copies_of_each_destination_are_kept(destinations: list[int], capacity: int) -> None:
    taken = [0] * 5
    expected = []
    for destination in destinations:
        expected.append(taken[destination] < capacity)
        taken[destination] += 1
    keep_C = within_capacity(torch.tensor(destinations, dtype=torch.long), 5, capacity)
    assert keep_C.tolist() == expected


def test_capacity_is_the_even_share_times_the_factor_rounded_up() -> None:
    assert [capacity_of(64, 8, factor) for factor in (1.0, 1.25, 1.01, 0.001)] == [8, 10, 9, 1]
