"""State as it is saved: named tensors, each flattened and cut into runs of elements that ranks own.

A tensor's name and shape do not depend on the layout of ranks; which run of its elements a rank holds does. So any
layout can read what another one wrote: `torch.distributed.checkpoint` finds the overlaps of one-dimensional runs.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A run of elements, from element `start` of the flattened tensor."""

    start: int
    values: Tensor
    """One-dimensional; a view where the owner is to be read or written in place."""


@dataclass
class ShardedTensor:
    """One named tensor of the whole job, and the runs of it that this rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: list[Shard] = field(default_factory=list)

    @property
    def numel(self) -> int:
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


class Staging:
    """Copies on the CPU of state that training will change; the buffers are used again for the next copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, state: State) -> State:
        """The same state with values of its own, finished when this returns."""
        before, self._buffers = self._buffers, {}
        copied: State = {}
        for name, tensor in state.items():
            copied[name] = ShardedTensor(tensor.shape, tensor.dtype)
            for shard in tensor.shards:
                buffer = before.get((name, shard.start))
                if buffer is None or buffer.shape != shard.values.shape or buffer.dtype != shard.values.dtype:
                    buffer = torch.empty_like(shard.values, device="cpu")
                self._buffers[name, shard.start] = buffer.copy_(shard.values)
                copied[name].shards.append(Shard(shard.start, buffer))
        return copied
