"""Capacity: upper limit of the copies for one expert or cluster. Dropless routing does not use it.

Shapes: C copies, B destinations.
"""

from math import ceil

import torch
from torch import Tensor


def capacity_of(copies: int, bins: int, factor: float) -> int:
    """Return the capacity of one of `bins` destinations: ceil(factor * copies / bins), at least 1 (GShard)."""
    return max(1, ceil(factor * copies / bins))


def within_capacity(index_C: Tensor, bins: int, capacity: int) -> Tensor:
    """Return keep_C, bool: True for the first `capacity` copies of each destination, in their order in `index_C`.

    Args:
        index_C: destination of each copy, in [0, bins), int64.
    """
    order_C = index_C.argsort(stable=True)
    sorted_C = index_C[order_C]
    count_B = index_C.new_zeros(bins).scatter_add_(0, index_C, torch.ones_like(index_C))
    start_B = count_B.cumsum(0) - count_B
    place_C = torch.arange(index_C.numel(), device=index_C.device) - start_B[sorted_C]
    return torch.empty_like(index_C, dtype=torch.bool).scatter_(0, order_C, place_C < capacity)
