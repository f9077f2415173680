"""State to be saved: named tensors, each flattened and cut into runs of elements that ranks own.

A tensor's name and shape do not depend on the layout of ranks; the runs of its elements that a rank holds do. Hence any
layout can read a checkpoint of any other: `torch.distributed.checkpoint` finds the overlaps of one-dimensional runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Run of elements, from element `start` of the flattened tensor."""

    start: int
    values: Tensor
    """Values, one-dimensional; a view where the owner is read or written in place."""

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.values.numel()


@dataclass(frozen=True)
class OffloadedShard:
    """Run of elements in a tier below the device, read into memory only when it is written or loaded."""

    start: int
    length: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Return a copy of the whole run."""
    write: Callable[[int, Tensor], None]
    """Overwrite elements from an index on."""

    @property
    def values(self) -> Tensor:
        """Copy of the values."""
        return self.read()


@dataclass
class ShardedTensor:
    """One named tensor of the whole job, and this rank's runs of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: Sequence[Shard | OffloadedShard] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole tensor, not of this rank's shards."""
        return torch.Size(self.shape).numel()

    @classmethod
    def whole(cls, value: Tensor) -> "ShardedTensor":
        """Create a tensor that this rank holds completely; where others do as well, one of them writes it."""
        return cls(tuple(value.shape), value.dtype, [Shard(0, value.detach().contiguous().view(-1))])

    @classmethod
    def row(cls, value: Tensor, rank: int, ranks: int) -> "ShardedTensor":
        """Create this rank's row of a tensor [ranks, ...] in which every rank has its own."""
        return cls(
            (ranks, *value.shape), value.dtype, [Shard(rank * value.numel(), value.detach().contiguous().view(-1))]
        )


State = dict[str, ShardedTensor]


def is_offloaded(state: State) -> bool:
    """Return True if some of the state is offloaded, so that it must be written before training changes it."""
    return any(isinstance(shard, OffloadedShard) for tensor in state.values() for shard in tensor.shards)


class Staging:
    """CPU buffers for copies of state that training will change, reused by the next copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, state: State) -> State:
        """Return a copy of the state, complete on return; offloaded shards are not copied."""
        before, self._buffers = self._buffers, {}
        copied: State = {}
        for name, tensor in state.items():
            shards: list[Shard | OffloadedShard] = []
            for shard in tensor.shards:
                if isinstance(shard, OffloadedShard):
                    shards.append(shard)
                    continue
                buffer = before.get((name, shard.start))
                if buffer is None or buffer.shape != shard.values.shape or buffer.dtype != shard.values.dtype:
                    buffer = torch.empty_like(shard.values, device="cpu")
                self._buffers[name, shard.start] = buffer.copy_(shard.values)
                shards.append(Shard(shard.start, buffer))
            copied[name] = ShardedTensor(tensor.shape, tensor.dtype, shards)
        return copied
