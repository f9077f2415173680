"""State as it is saved: named tensors, each flattened and cut into runs of elements that ranks own.

A tensor's name and shape do not depend on the layout of ranks; which run of its elements a rank holds does. So any
layout can read what another one wrote: `torch.distributed.checkpoint` finds the overlaps of one-dimensional runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A run of elements, from element `start` of the flattened tensor."""

    start: int
    values: Tensor
    """One-dimensional; a view where the owner is to be read or written in place."""

    @property
    def length(self) -> int:
        """Elements."""
        return self.values.numel()


@dataclass(frozen=True)
class OffloadedShard:
    """A run of elements that is kept in a tier below the device, and is not brought into memory before its turn."""

    start: int
    length: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """A copy of all of it."""
    write: Callable[[int, Tensor], None]
    """Replaces a part of it, from an element on."""

    @property
    def values(self) -> Tensor:
        """A copy."""
        return self.read()


@dataclass
class ShardedTensor:
    """One named tensor of the whole job, and the runs of it that this rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: Sequence[Shard | OffloadedShard] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole tensor, not of this rank's shards."""
        return torch.Size(self.shape).numel()

    @classmethod
    def whole(cls, value: Tensor) -> "ShardedTensor":
        """A tensor that this rank holds whole; where others do as well, one of them writes it."""
        return cls(tuple(value.shape), value.dtype, [Shard(0, value.detach().contiguous().view(-1))])

    @classmethod
    def row(cls, value: Tensor, rank: int, ranks: int) -> "ShardedTensor":
        """This rank's row of a tensor [ranks, ...] in which every rank has its own."""
        return cls(
            (ranks, *value.shape), value.dtype, [Shard(rank * value.numel(), value.detach().contiguous().view(-1))]
        )


State = dict[str, ShardedTensor]


def is_away(state: State) -> bool:
    """Whether some of it is not in memory, so that it must be written before training changes it."""
    return any(isinstance(shard, OffloadedShard) for tensor in state.values() for shard in tensor.shards)


class Staging:
    """Copies on the CPU of state that training will change; the buffers are used again for the next copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, state: State) -> State:
        """The same state with values of its own, finished when this returns; what is away stays there."""
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
