"""An upper limit on what one destination takes; dropless routing does not use it."""

from math import ceil

import torch
from torch import Tensor


def capacity_of(copies: int, bins: int, factor: float) -> int:
    """Copies that one of `bins` destinations takes: ceil(factor * copies / bins), at least 1 (GShard)."""
    return max(1, ceil(factor * copies / bins))


def within_capacity(index_C: Tensor, bins: int, capacity: int) -> Tensor:
    """keep_C, bool: the first `capacity` copies of each destination, in the order in which they stand.

    Args:
        index_C: destination of each copy, in [0, bins), int64.
    """
    order_C = index_C.argsort(stable=True)
    sorted_C = index_C[order_C]
    count_B = index_C.new_zeros(bins).scatter_add_(0, index_C, torch.ones_like(index_C))
    start_B = count_B.cumsum(0) - count_B
    place_C = torch.arange(index_C.numel(), device=index_C.device) - start_B[sorted_C]
    return torch.empty_like(index_C, dtype=torch.bool).scatter_(0, order_C, place_C < capacity)
