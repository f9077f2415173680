"""Slices of clustered experts along their hidden width (`world.shard_mode=slice`): expert tensor parallelism.

A rank of a block holds the hidden units of one slice of every expert: columns of the input projections, rows of the
output projection, and their vectors. U of the input and V of the output projection, and the output bias, have no hidden
dimension: each rank holds them whole.

Shapes: D model width, F hidden width, H = 2 F (gate | up), R rank, S ranks of a block.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = {
    "w_in_DH": (-1, 2),
    "w_out_FD": (-2, 1),
    "in_v_RH": (-1, 1),
    "out_u_FR": (-2, 1),
    "hidden_gate_F": (-1, 1),
    "hidden_bias_H": (-1, 2),
}
"""Hidden dimension of each tensor that is sliced, and the number of halves (gate | up) in it."""


class HiddenSlice(NamedTuple):
    """Slice `number` of `slices` of the hidden width."""

    number: int
    slices: int

    def cut(self, name: str, value: Tensor) -> Tensor:
        """Return this slice of a base's or an expert's tensor; others are returned whole."""
        if self.slices == 1 or name not in HIDDEN:
            return value
        axis, halves = HIDDEN[name]
        parts = [half.chunk(self.slices, dim=axis)[self.number] for half in value.chunk(halves, dim=axis)]
        return torch.cat(parts, dim=axis)

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor of which a slice has this shape."""
        if name not in HIDDEN:
            return shape
        whole = list(shape)
        whole[HIDDEN[name][0]] *= self.slices
        return tuple(whole)

    def runs(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """Yield the runs of elements of a slice: its start in the slice, its start in the whole tensor, its length."""
        if self.slices == 1 or name not in HIDDEN:
            yield 0, 0, prod(shape)
            return
        axis, halves = HIDDEN[name]
        length = prod(shape[axis:]) // halves
        for row in range(prod(shape[:axis]) * halves):
            yield row * length, (row * self.slices + self.number) * length, length


WHOLE = HiddenSlice(0, 1)
"""The whole hidden width: experts are not sliced."""
