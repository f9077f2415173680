"""Permutations of rows, against plain indexing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.dispatch.permute import inverse, permuted


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
