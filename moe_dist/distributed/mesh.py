"""The mesh of ranks and its process groups: pipeline stages, their layout of experts, and their layout of attention.

Ranks are numbered stage by stage: rank = stage * ranks of a stage + position. Positions in a stage are numbered with
the shard axis innermost, so that a cluster group is a run of neighboring ranks and fits in a node: position =
(data * clusters + cluster) * shards + shard. Where the ranks of a block are replicas (`world.shard_mode=replicate`),
they are the innermost part of the data axis instead.

Attention has a layout of its own over the same ranks (parallel folding): position = (sequence group * contexts +
context) * tensors + tensor. The ranks of a sequence group hold parts of the same sequences; MoE layers see only that
each rank has other tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import cache
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.config import WorldShape
from moe_dist.errors import ConfigError


class GroupKind(StrEnum):
    """Kind of process group."""

    STAGE_ONE = "stage_one"  # same data and shard index, all clusters: dispatch of tokens to clusters
    CLUSTER = "cluster"  # same data and cluster index, all shards: the ranks that together hold a block of clusters
    EXPERT_PARALLEL = "expert_parallel"  # same data index: the ranks that together hold all experts once
    BASE_DATA = "base_data"  # same cluster index: replicas of the same bases
    EXPERT_DATA = "expert_data"  # same cluster and shard index: replicas of the same experts
    TENSOR = "tensor"  # same sequences and context index: divide attention heads, embedding, output layer
    CONTEXT = "context"  # same sequences and tensor index: divide sequences in attention
    SEQUENCE = "sequence"  # same sequences: tensor x context
    TENSOR_DATA = "tensor_data"  # same tensor index: replicas of the same tensor-parallel shards
    STAGE = "stage"  # same pipeline stage: the ranks that hold the same layers
    PIPELINE = "pipeline"  # same position in all stages: the ranks that together hold all layers


@dataclass(frozen=True)
class Coordinates:
    """Position of a rank in the layout of experts of its pipeline stage."""

    data: int
    cluster: int
    shard: int


def rank_at(shape: WorldShape, at: Coordinates, stage: int = 0) -> int:
    """Return the rank at a position of a pipeline stage."""
    outer, inner = divmod(at.data, shape.replicas)
    position = ((outer * shape.cluster + at.cluster) * shape.replicas + inner) * shape.shard + at.shard
    return stage * shape.stage_ranks + position


def coordinates_of(shape: WorldShape, rank: int) -> Coordinates:
    """Return the position of a rank in the layout of experts of its pipeline stage."""
    rest, shard = divmod(rank % shape.stage_ranks, shape.shard)
    rest, inner = divmod(rest, shape.replicas)
    outer, cluster = divmod(rest, shape.cluster)
    return Coordinates(outer * shape.replicas + inner, cluster, shard)


_COMMON: dict[GroupKind, Callable[[Coordinates], tuple[int, ...]]] = {
    GroupKind.STAGE_ONE: lambda at: (at.data, at.shard),
    GroupKind.CLUSTER: lambda at: (at.data, at.cluster),
    GroupKind.EXPERT_PARALLEL: lambda at: (at.data,),
    GroupKind.BASE_DATA: lambda at: (at.cluster,),
    GroupKind.EXPERT_DATA: lambda at: (at.cluster, at.shard),
}


class AttentionCoordinates(NamedTuple):
    """Position of a rank in the layout of attention."""

    group: int
    context: int
    tensor: int


def attention_coordinates(shape: WorldShape, rank: int) -> AttentionCoordinates:
    """Return the position of a rank in the layout of attention of its pipeline stage."""
    rest, tensor = divmod(rank % shape.stage_ranks, shape.tensor)
    return AttentionCoordinates(*divmod(rest, shape.context), tensor)


_COMMON_OF_ATTENTION: dict[GroupKind, Callable[[AttentionCoordinates], tuple[int, ...]]] = {
    GroupKind.TENSOR: lambda at: (at.group, at.context),
    GroupKind.CONTEXT: lambda at: (at.group, at.tensor),
    GroupKind.SEQUENCE: lambda at: (at.group,),
    GroupKind.TENSOR_DATA: lambda at: (at.tensor,),
}


def group_layout(shape: WorldShape) -> list[tuple[GroupKind, tuple[int, ...]]]:
    """Return every group of the mesh, in the order in which all ranks must create them.

    The groups of attention exist only if sequences are divided among ranks, those of the pipeline only if layers are.
    """
    ranks, per_stage = range(shape.ranks), shape.stage_ranks
    keys = {
        kind: [(rank // per_stage, *common(coordinates_of(shape, rank))) for rank in ranks]
        for kind, common in _COMMON.items()
    }
    if shape.sequence_parts > 1:
        places = [(rank // per_stage, attention_coordinates(shape, rank)) for rank in ranks]
        for kind, common_of in _COMMON_OF_ATTENTION.items():
            keys[kind] = [(stage, *common_of(at)) for stage, at in places]
    if shape.pipeline > 1:
        keys[GroupKind.STAGE] = [(rank // per_stage,) for rank in ranks]
        keys[GroupKind.PIPELINE] = [(rank % per_stage,) for rank in ranks]
    layout = []
    for kind, key_of_rank in keys.items():
        members: dict[tuple[int, ...], list[int]] = {}
        for rank, key in enumerate(key_of_rank):
            members.setdefault(key, []).append(rank)
        layout += [(kind, tuple(ranks)) for _, ranks in sorted(members.items())]
    return layout


@dataclass(frozen=True)
class RankGroup:
    """Process group of this rank.

    Attributes:
        ranks: global ranks of the group, in order.
        handle: torch's process group; None: a single process.
    """

    kind: GroupKind
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


CLUSTER_DIMS, SHARD_DIMS = ("cluster", "ep", "expert"), ("shard", "etp")
"""Names of device mesh dimensions that become the cluster axis and the shard axis; all others are the data axis."""


@dataclass(frozen=True)
class Mesh:
    """Position of this rank in the mesh, and its groups."""

    shape: WorldShape
    rank: int
    groups: dict[GroupKind, RankGroup]

    @property
    def at(self) -> Coordinates:
        """Position of this rank."""
        return coordinates_of(self.shape, self.rank)

    @property
    def in_attention(self) -> AttentionCoordinates:
        """Position of this rank in the layout of attention."""
        return attention_coordinates(self.shape, self.rank)

    @property
    def stage(self) -> int:
        """Pipeline stage of this rank."""
        return self.rank // self.shape.stage_ranks

    @property
    def stage_group(self) -> dist.ProcessGroup | None:
        """Process group of the ranks that hold the same layers; None: all ranks."""
        group = self.groups.get(GroupKind.STAGE)
        return None if group is None else group.handle

    @property
    def sequence_group(self) -> RankGroup | None:
        """Ranks that hold parts of this rank's sequences; None: it holds them whole."""
        return self.groups.get(GroupKind.SEQUENCE)

    def group(self, kind: GroupKind) -> RankGroup:
        """Return the group of one kind that this rank belongs to."""
        return self.groups[kind]

    def index_in(self, kind: GroupKind) -> int:
        """Return this rank's index in its group of one kind of the experts' layout."""
        at, shape = self.at, self.shape
        return {
            GroupKind.STAGE_ONE: at.cluster,
            GroupKind.CLUSTER: at.shard,
            GroupKind.EXPERT_PARALLEL: at.cluster * shape.shard + at.shard,
            GroupKind.BASE_DATA: at.data * shape.shard + at.shard,
            GroupKind.EXPERT_DATA: at.data,
        }[kind]

    @classmethod
    def alone(cls) -> "Mesh":
        """Return the mesh of a single process, which needs no process group."""
        return cls(WorldShape(1, 1, 1), 0, {kind: RankGroup(kind, (0,), None) for kind in _COMMON})

    @classmethod
    def create(cls, shape: WorldShape, timeout: timedelta | None = None) -> "Mesh":
        """Create the groups over all ranks; collective.

        Args:
            timeout: timeout of the groups' collectives; None: torch's default.
        """
        rank, groups = dist.get_rank(), {}
        for kind, ranks in group_layout(shape):
            handle = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                groups[kind] = RankGroup(kind, ranks, handle)
        return cls(shape, rank, groups)

    @classmethod
    def over_world(cls, shape: WorldShape) -> "Mesh":
        """Return the mesh over all ranks of the default process group, cached by shape; its creation is collective."""
        return _created(dist.group.WORLD, shape)

    @classmethod
    def from_device_mesh(cls, device_mesh: DeviceMesh) -> "Mesh":
        """Create the groups over the ranks of a device mesh; collective over those ranks.

        A dimension named cluster, ep or expert becomes the cluster axis, one named shard or etp the shard axis, all
        others the data axis. The dimension of an unnamed one-dimensional mesh becomes the cluster axis.

        Raises:
            ConfigError: a mesh of several dimensions has no names, or two of them claim one axis.
        """
        names = device_mesh.mesh_dim_names or (("cluster",) if device_mesh.ndim == 1 else ())
        if len(names) != device_mesh.ndim:
            raise ConfigError(
                f"a device mesh of {device_mesh.ndim} dimensions needs mesh_dim_names: name the one that divides the "
                f"clusters {' or '.join(CLUSTER_DIMS)}"
            )
        cluster = [i for i, name in enumerate(names) if name in CLUSTER_DIMS]
        shard = [i for i, name in enumerate(names) if name in SHARD_DIMS]
        if len(cluster) > 1 or len(shard) > 1:
            raise ConfigError(f"mesh_dim_names={names}: at most one of {CLUSTER_DIMS} and one of {SHARD_DIMS}")
        data = [i for i in range(device_mesh.ndim) if i not in (*cluster, *shard)]
        sizes = [device_mesh.mesh.shape[axes[0]] if axes else 1 for axes in (cluster, shard)]
        ranks = device_mesh.mesh.permute(*data, *cluster, *shard).flatten().tolist()
        shape = WorldShape(len(ranks) // (sizes[0] * sizes[1]), sizes[0], sizes[1])
        return cls._over(ranks, shape)

    @classmethod
    def from_process_groups(cls, expert_parallel: dist.ProcessGroup, expert_data: dist.ProcessGroup) -> "Mesh":
        """Return the mesh of two existing groups of this rank, which creates no further groups.

        Args:
            expert_parallel: ranks that together hold all clusters once, in the order of the clusters.
            expert_data: ranks that hold replicas of this rank's clusters.
        """
        shape = WorldShape(dist.get_world_size(expert_data), dist.get_world_size(expert_parallel), 1)
        at = Coordinates(dist.get_rank(expert_data), dist.get_rank(expert_parallel), 0)
        handles: dict[GroupKind, dist.ProcessGroup] = {
            GroupKind.STAGE_ONE: expert_parallel,
            GroupKind.EXPERT_PARALLEL: expert_parallel,
            GroupKind.BASE_DATA: expert_data,
            GroupKind.EXPERT_DATA: expert_data,
        }
        groups = {
            kind: RankGroup(kind, tuple(dist.get_process_group_ranks(handle)), handle)
            for kind, handle in handles.items()
        }
        groups[GroupKind.CLUSTER] = RankGroup(GroupKind.CLUSTER, (dist.get_rank(),), None)
        return cls(shape, rank_at(shape, at), groups)

    @classmethod
    def _over(cls, ranks: list[int], shape: WorldShape) -> "Mesh":
        """Create the groups over `ranks`, given in the order of their positions; each rank creates only its own."""
        position, groups = ranks.index(dist.get_rank()), {}
        for kind, positions in group_layout(shape):
            if position in positions:
                members = [ranks[other] for other in positions]
                handle = dist.new_group(members, use_local_synchronization=True)
                groups[kind] = RankGroup(kind, tuple(members), handle)
        return cls(shape, position, groups)


@cache
def _created(world: dist.ProcessGroup, shape: WorldShape) -> Mesh:
    return Mesh.create(shape)
