"""What moves between tiers: one kind of knowledge of one cluster's parameters, as one run of elements."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

ALIGN = 16
"""Every parameter begins at a multiple of so many elements, as vector instructions like it."""

Choice = TypeVar("Choice")


class TensorKind(StrEnum):
    """What is known of a cluster's parameters."""

    WEIGHT = "weight"
    MASTER = "master"
    GRADIENT = "gradient"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"
    STORED = "stored form"


class Block(NamedTuple):
    """A kind of one of this rank's clusters; `local` is its place among those of the layer."""

    layer: int
    local: int
    kind: TensorKind


class BlockSize(NamedTuple):
    """How large a block is."""

    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of all its numbers."""
        return self.elements * self.dtype.itemsize


class Tier(Protocol):
    """Somewhere blocks can be kept. A block that was never written reads as zeros."""

    def register(self, block: Block, size: BlockSize) -> None:
        """Makes a block known, before it is first read or written."""

    def read(self, block: Block, into: Tensor) -> None:
        """Fills a one-dimensional tensor with the block."""

    def write(self, block: Block, values: Tensor) -> None:
        """Keeps a copy of the values as the block."""

    def discard(self, block: Block) -> None:
        """The block reads as zeros again."""

    def close(self) -> None:
        """Gives up all that is kept."""


@dataclass(frozen=True)
class Span:
    """Where a parameter is within its cluster's run of elements."""

    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """One past its last element; what follows up to the next multiple of `ALIGN` is zero."""
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class BlockLayout:
    """A cluster's parameters one after another, in the order in which they were given."""

    spans: Mapping[str, Span]
    elements: int

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size]) -> "BlockLayout":
        """Lays tensors of these shapes out one behind the other, each aligned."""
        spans, start = {}, 0
        for name, shape in shapes.items():
            spans[name] = Span(start, torch.Size(shape))
            start += -(-shape.numel() // ALIGN) * ALIGN
        return cls(spans, start)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of a run, in its own shape."""
        return {name: flat[span.start : span.end].view(span.shape) for name, span in self.spans.items()}

    def runs(self, chosen: Sequence[Choice]) -> Iterator[tuple[Choice, slice]]:
        """Neighbouring parameters of equal choice, as whole runs of elements with what lies between them."""
        starts = [*(span.start for span in self.spans.values()), self.elements]
        for choice, group in groupby(range(len(chosen)), key=lambda index: chosen[index]):
            indices = list(group)
            yield choice, slice(starts[indices[0]], starts[indices[-1] + 1])
