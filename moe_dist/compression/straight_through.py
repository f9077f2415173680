"""Straight-through estimator: a change in the forward pass that the backward pass ignores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def straight_through(value: Tensor, change: Change) -> Tensor:
    """Return `change(value)`, to the bit, with the gradient of `value`; `change` keeps shape and type."""
    changed: Tensor = _StraightThrough.apply(value, change)  # type: ignore[no-untyped-call]
    return changed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Change) -> Tensor:
        return change(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
