"""Permutations of rows, against plain indexing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.dispatch.permute import count, group_order, inverse, permuted


@given(st.integers(0, 9), st.integers(0, 1000))
def test_a_permutation_and_its_gradient_are_those_of_indexing(rows: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x_RD, weight_RD = torch.randn(2, rows, 3, generator=draw)
    order_R = torch.randperm(rows, generator=draw)
    found_RD, expected_RD = x_RD.clone().requires_grad_(), x_RD.clone().requires_grad_()
    y_RD, z_RD = permuted(found_RD, order_R, inverse(order_R)), expected_RD[order_R]
    assert torch.equal(y_RD, z_RD)
    (y_RD * weight_RD).sum().backward()
    (z_RD * weight_RD).sum().backward()
    assert found_RD.grad is not None
    assert expected_RD.grad is not None
    assert torch.equal(found_RD.grad, expected_RD.grad)


def test_rows_by_source_and_group_are_ordered_by_group_and_source() -> None:
    """The first source has 1 row for group 0 and 2 for group 1, the second 2 for group 0, the third 1 for group 1."""
    count_SG = torch.tensor([[1, 2], [2, 0], [0, 1]])
    assert group_order(count_SG, 6).tolist() == [0, 3, 4, 1, 2, 5]


def test_occurrences_are_counted_and_a_permutation_is_inverted() -> None:
    assert count(torch.tensor([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]
    assert inverse(torch.tensor([2, 0, 1])).tolist() == [1, 2, 0]
