"""Small index operations that the dispatch strategies share."""

from typing import Any

import torch
from torch import Tensor


def permuted(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """`x_RD[order_R]` of a permutation and its inverse: gradients are gathered too, not added up by index."""
    rows: Tensor = _Permuted.apply(x_RD, order_R, inverse_R)  # type: ignore[no-untyped-call]
    return rows


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


def count(index_R: Tensor, bins: int) -> Tensor:
    """How often each of `bins` values occurs, int64; like bincount, without its synchronisation."""
    return index_R.new_zeros(bins, dtype=torch.int64).scatter_add_(0, index_R, torch.ones_like(index_R))


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))


def group_order(count_SG: Tensor, rows: int) -> Tensor:
    """Order that turns rows sorted by (source, group) into rows sorted by (group, source).

    Args:
        count_SG: rows that each source sent for each group, int64.
        rows: their sum, known to the host.
    """
    sources, groups = count_SG.shape
    group_R = torch.arange(groups, device=count_SG.device).repeat(sources)
    return group_R.repeat_interleave(count_SG.flatten(), output_size=rows).argsort(stable=True)
