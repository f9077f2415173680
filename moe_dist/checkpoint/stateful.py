"""Stateful parts of a run, besides parameters and optimizer state, that a checkpoint must contain."""

import copy
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_dist.checkpoint.manifest import Index, Manifest, TensorRecord
from moe_dist.checkpoint.sharded_tensor import Shard, ShardedTensor, State


class Stateful(Protocol):
    """Object with a state: tensors and JSON values, by name.

    They are equal on all ranks, unless the class names them in one of two attributes:

    - `summed_over_ranks`: every rank has its own addend, and only their sum is meaningful. On the same number of
      ranks each gets its own back; on another number they are distributed so that the sum is preserved.
    - `own_of_rank`: every rank has its own value, restored on the same number of ranks; else the name is missing.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state; tensors and values may alias the live ones."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore the state; tensors are on the CPU and have the shape in which they were saved."""


Parts = Mapping[str, Stateful]


def tensors_of(parts: Parts, rank: int, ranks: int) -> State:
    """Return the tensors of all parts, for saving."""
    state: State = {}
    for part_name, part in parts.items():
        by_rank = {*_summed(part), *_own(part)}
        for name, value in part.state_dict().items():
            if isinstance(value, Tensor):
                row = name in by_rank
                sharded = ShardedTensor.row(value, rank, ranks) if row else ShardedTensor.whole(value)
                state[_key(part_name, name)] = sharded
    return state


def values_of(parts: Parts) -> dict[str, dict[str, Any]]:
    """Return copies of the non-tensor values of every part: the manifest is written while later steps change them."""
    return {
        part_name: {
            name: copy.deepcopy(value) for name, value in part.state_dict().items() if not isinstance(value, Tensor)
        }
        for part_name, part in parts.items()
    }


def allocate_like(parts: Parts, index: Index, rank: int, ranks: int) -> State:
    """Allocate zeros, in the saved shapes, for this rank's tensors of each part."""
    room: State = {}
    for part_name, part in parts.items():
        for key, tensor in index.tensors.items():
            if not key.startswith(_key(part_name, "")):
                continue
            name = key.removeprefix(_key(part_name, ""))
            if name in _summed(part):
                room[key] = _rows(tensor, range(rank, tensor.shape[0], ranks))
            elif name not in _own(part):
                room[key] = ShardedTensor.whole(torch.zeros(tensor.shape, dtype=tensor.torch_dtype))
            elif tensor.shape[0] == ranks:
                room[key] = _rows(tensor, range(rank, rank + 1))
    return room


def load_state(parts: Parts, filled: State, manifest: Manifest) -> None:
    """Restore every part that the checkpoint contains; the others stay unchanged."""
    for part_name, part in parts.items():
        state: dict[str, Any] = dict(manifest.values.get(part_name, {}))
        for key, tensor in filled.items():
            if key.startswith(_key(part_name, "")):
                name = key.removeprefix(_key(part_name, ""))
                state[name] = _value(tensor, by_rank=name in {*_summed(part), *_own(part)})
        if state:
            part.load_state_dict(state)


def _value(tensor: ShardedTensor, by_rank: bool) -> Tensor:
    """Return the tensor itself, or the sum of this rank's rows; zeros if there are more ranks than rows."""
    if not by_rank:
        return tensor.shards[0].values.view(tensor.shape)
    total = torch.zeros(tensor.shape[1:], dtype=tensor.dtype)
    for shard in tensor.shards:
        total += shard.values.view(tensor.shape[1:])
    return total


def _rows(tensor: TensorRecord, rows: range) -> ShardedTensor:
    size = torch.Size(tensor.shape[1:]).numel()
    shards = [Shard(row * size, torch.zeros(size, dtype=tensor.torch_dtype)) for row in rows]
    return ShardedTensor(tuple(tensor.shape), tensor.torch_dtype, shards)


def _key(part: str, name: str) -> str:
    return f"part/{part}/{name}"


def _summed(part: Stateful) -> Collection[str]:
    names: Collection[str] = getattr(part, "summed_over_ranks", ())
    return names


def _own(part: Stateful) -> Collection[str]:
    names: Collection[str] = getattr(part, "own_of_rank", ())
    return names
