"""Save and load planners for `torch.distributed.checkpoint` that reshard between any two layouts."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_dist.checkpoint.sharded_tensor import OffloadedShard, Shard, ShardedTensor, State


class ShardSavePlanner(DefaultSavePlanner):
    """Save planner for the shards of a `State`; of shards that several ranks hold alike, one rank writes each.

    torch's own planner rejects shards that overlap.
    """

    state_dict: State

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Return one write item per shard of this rank, identified by tensor name and first element."""
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(name, (shard.start,)),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk_of(shard), TensorProperties(dtype=tensor.dtype), torch.Size([tensor.numel])
                    ),
                )
                for name, tensor in self.state_dict.items()
                for shard in tensor.shards
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the values of a write item's shard, [length]; an offloaded one is read from its tier now."""
        return _shard_at(self.state_dict, index).values


class ShardLoadPlanner(DefaultLoadPlanner):
    """Load planner that fills every shard of a `State` from shards of any layout, converting types."""

    state_dict: State

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: State, metadata: Metadata | StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Store the state unchanged; torch's own planner would look in it for tensors to initialize."""
        assert isinstance(metadata, Metadata)
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return the reads that fill every shard of this rank, for any boundaries of the shards on disk."""
        return LoadPlan(list(self._reads()))

    def _reads(self) -> Iterator[ReadItem]:
        assert self.metadata is not None
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            yield from create_read_items_for_chunk_list(name, stored, [chunk_of(shard) for shard in tensor.shards])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that a shard is read into, [length]: its own values, or a buffer if it is offloaded."""
        shard = _shard_at(self.state_dict, index)
        return torch.empty(shard.length, dtype=shard.dtype) if isinstance(shard, OffloadedShard) else shard.values

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Write the elements that were read into a tensor of `resolve_tensor` to their tier."""
        shard = _shard_at(self.state_dict, read_item.dest_index)
        if isinstance(shard, OffloadedShard):
            shard.write(read_item.dest_offsets[0], tensor)


def chunk_of(shard: Shard | OffloadedShard) -> ChunkStorageMetadata:
    """Return the offsets and sizes of a shard in its flattened tensor."""
    return ChunkStorageMetadata(torch.Size([shard.start]), torch.Size([shard.length]))


def _shard_at(state: State, index: MetadataIndex) -> Shard | OffloadedShard:
    tensor: ShardedTensor = state[index.fqn]
    assert index.offset is not None
    return next(shard for shard in tensor.shards if shard.start == index.offset[0])
