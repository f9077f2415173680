"""Standard experts against one matrix product at a time."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moe_dist.moe.standard_experts import Implementation, StandardExperts

HIDDEN, EXPERT_HIDDEN = 16, 24


def init(dtype: torch.dtype) -> Callable[[int], tuple[Tensor, Tensor]]:
    def draw(expert: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(expert)
        w_in = torch.randn(HIDDEN, 2 * EXPERT_HIDDEN, generator=generator) * 0.3
        return w_in.to(dtype), (torch.randn(EXPERT_HIDDEN, HIDDEN, generator=generator) * 0.3).to(dtype)

    return draw


def reference(x: Tensor, counts: list[int], experts: StandardExperts) -> Tensor:
    """Row by row, as the formula is written."""
    rows = []
    for row, expert in zip(x, [e for e, count in enumerate(counts) for _ in range(count)], strict=True):
        pre = row @ experts.w_in[expert]
        rows.append((functional.silu(pre[:EXPERT_HIDDEN]) * pre[EXPERT_HIDDEN:]) @ experts.w_out[expert])
    return torch.stack(rows) if rows else x * 1.0


@pytest.mark.parametrize("implementation", ["auto", "loop", "grouped_mm"])
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), as_tensor=st.booleans())
def test_agrees_with_reference(implementation: Implementation, counts: list[int], as_tensor: bool) -> None:
    experts = StandardExperts(len(counts), init(torch.float32), implementation)
    x = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = experts(x, torch.tensor(counts) if as_tensor else counts)
    expected = reference(x, counts, experts)
    leaves = [x, *experts.parameters()]
    d_y = torch.linspace(-1, 1, y.numel()).view_as(y)
    found = torch.autograd.grad(y, leaves, d_y)
    wanted = torch.autograd.grad(expected, leaves, d_y, allow_unused=True, materialize_grads=True)
    for one, other in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["loop", "grouped_mm"])
def test_an_expert_without_rows_gets_zero_gradients(implementation: Implementation) -> None:
    experts = StandardExperts(3, init(torch.float32), implementation)
    experts(torch.randn(4, HIDDEN), [4, 0, 0]).square().sum().backward()
    for weights in (experts.w_in, experts.w_out):
        first, *rest = (w.grad for w in weights)
        assert first is not None
        assert first.abs().max() > 0
        assert all(grad is not None and grad.abs().max() == 0 for grad in rest)


def test_parameters_are_leaves_of_their_own_expert() -> None:
    experts = StandardExperts(3, init(torch.bfloat16))
    assert [tuple(w.shape) for w in experts.w_in] == [(HIDDEN, 2 * EXPERT_HIDDEN)] * 3
    assert all(w.is_leaf and w.dtype == torch.bfloat16 for w in experts.parameters())
    assert torch.equal(experts.w_in[2], init(torch.bfloat16)(2)[0])
