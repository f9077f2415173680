"""Index operations shared by the dispatchers.

Shapes: R rows, D their width, S sources, G groups.
"""

from typing import Any

import torch
from torch import Tensor


def permuted(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Return `x_RD[order_R]` for a permutation and its inverse; the backward pass gathers instead of index-adding."""
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
    """Count the occurrences of each of `bins` values, int64; like bincount, but without host synchronization."""
    return index_R.new_zeros(bins, dtype=torch.int64).scatter_add_(0, index_R, torch.ones_like(index_R))


def inverse(order_R: Tensor) -> Tensor:
    """Return the inverse of the permutation `order_R`."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))


def group_order(count_SG: Tensor, rows: int) -> Tensor:
    """Return the permutation from rows sorted by (source, group) to rows sorted by (group, source).

    Args:
        count_SG: number of rows from each source for each group, int64.
        rows: sum of the counts; an int, which avoids a host synchronization.
    """
    sources, groups = count_SG.shape
    group_R = torch.arange(groups, device=count_SG.device).repeat(sources)
    return group_R.repeat_interleave(count_SG.flatten(), output_size=rows).argsort(stable=True)
