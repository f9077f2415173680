"""Unit of transfer between memory tiers: one kind of tensor of one cluster, as one run of elements."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

ALIGN = 16
"""Elements to whose multiple the start of every parameter is aligned, for vector instructions."""

Choice = TypeVar("Choice")


class TensorKind(StrEnum):
    """Kind of a cluster's tensors: weights, gradients, optimizer state, or quantized weights."""

    WEIGHT = "weight"
    MASTER = "master"
    GRADIENT = "gradient"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"
    QUANTIZED = "quantized weights"


class Block(NamedTuple):
    """One kind of tensor of one cluster on this rank.

    Attributes:
        local: index of the cluster among this rank's clusters of its layer.
        saved: True for a copy (`saved_cluster.py`).
    """

    layer: int
    local: int
    kind: TensorKind
    saved: bool = False


class BlockSize(NamedTuple):
    """Number and type of a block's elements."""

    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.elements * self.dtype.itemsize


class Tier(Protocol):
    """Storage of blocks. A block that was never written reads as zeros."""

    def register(self, block: Block, size: BlockSize) -> None:
        """Declare a block, before it is first read or written."""

    def read(self, block: Block, into: Tensor) -> None:
        """Copy the block into a one-dimensional tensor."""

    def write(self, block: Block, values: Tensor) -> None:
        """Store a copy of the values as the block."""

    def discard(self, block: Block) -> None:
        """Reset the block to zeros."""

    def close(self) -> None:
        """Release all storage."""


@dataclass(frozen=True)
class Span:
    """Position of a parameter in its cluster's run of elements."""

    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """Index after its last element; the padding up to the next multiple of `ALIGN` is zero."""
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class BlockLayout:
    """Positions of a cluster's parameters in one run of elements, in the order given."""

    spans: Mapping[str, Span]
    elements: int

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size]) -> "BlockLayout":
        """Lay tensors of these shapes out one behind the other, each aligned."""
        spans, start = {}, 0
        for name, shape in shapes.items():
            spans[name] = Span(start, torch.Size(shape))
            start += -(-shape.numel() // ALIGN) * ALIGN
        return cls(spans, start)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return each parameter's part of a run, in its shape."""
        return {name: flat[span.start : span.end].view(span.shape) for name, span in self.spans.items()}

    def runs(self, chosen: Sequence[Choice]) -> Iterator[tuple[Choice, slice]]:
        """Yield neighboring parameters of equal choice as whole runs of elements, padding included."""
        starts = [*(span.start for span in self.spans.values()), self.elements]
        for choice, group in groupby(range(len(chosen)), key=lambda index: chosen[index]):
            indices = list(group)
            yield choice, slice(starts[indices[0]], starts[indices[-1] + 1])
