"""The data x cluster x shard mesh of ranks and its process groups.

Ranks are numbered with the shard axis innermost, so that a cluster group is a run of neighbouring ranks and fits in a
node: rank = (data * clusters + cluster) * shards + shard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import product

import torch.distributed as dist

from moe_dist.config import WorldShape


class GroupKind(StrEnum):
    """A kind of process group, named by what its ranks do together."""

    STAGE_ONE = "stage_one"  # same data and shard index, all clusters: one hop takes a token to its cluster
    CLUSTER = "cluster"  # same data and cluster index, all shards: together they hold a block of clusters
    EXPERT_PARALLEL = "expert_parallel"  # same data index: together they hold all experts once
    BASE_DATA = "base_data"  # same cluster index: replicas of the same bases
    EXPERT_DATA = "expert_data"  # same cluster and shard index: replicas of the same experts


@dataclass(frozen=True)
class Coordinates:
    """Position of a rank in the mesh."""

    data: int
    cluster: int
    shard: int


def rank_at(shape: WorldShape, at: Coordinates) -> int:
    """The rank at a position in the mesh."""
    return (at.data * shape.cluster + at.cluster) * shape.shard + at.shard


def coordinates_of(shape: WorldShape, rank: int) -> Coordinates:
    """A rank's position in the mesh."""
    outer, shard = divmod(rank, shape.shard)
    return Coordinates(*divmod(outer, shape.cluster), shard)


_COMMON: dict[GroupKind, Callable[[Coordinates], tuple[int, ...]]] = {
    GroupKind.STAGE_ONE: lambda at: (at.data, at.shard),
    GroupKind.CLUSTER: lambda at: (at.data, at.cluster),
    GroupKind.EXPERT_PARALLEL: lambda at: (at.data,),
    GroupKind.BASE_DATA: lambda at: (at.cluster,),
    GroupKind.EXPERT_DATA: lambda at: (at.cluster, at.shard),
}


def group_layout(shape: WorldShape) -> list[tuple[GroupKind, tuple[int, ...]]]:
    """Every group of the mesh, in the one order in which all ranks create them."""
    layout = []
    for kind, common in _COMMON.items():
        members: dict[tuple[int, ...], list[int]] = {}
        for at in (Coordinates(*axes) for axes in product(range(shape.data), range(shape.cluster), range(shape.shard))):
            members.setdefault(common(at), []).append(rank_at(shape, at))
        layout += [(kind, tuple(sorted(ranks))) for _, ranks in sorted(members.items())]
    return layout


@dataclass(frozen=True)
class RankGroup:
    """One of this rank's groups: its global ranks in order, and torch's handle."""

    kind: GroupKind
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """How many ranks it has."""
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """This rank's place and its groups."""

    shape: WorldShape
    rank: int
    groups: dict[GroupKind, RankGroup]

    @property
    def at(self) -> Coordinates:
        """This rank's position."""
        return coordinates_of(self.shape, self.rank)

    def group(self, kind: GroupKind) -> RankGroup:
        """The group of one kind that this rank belongs to."""
        return self.groups[kind]

    @classmethod
    def alone(cls) -> "Mesh":
        """A single process that needs no process group."""
        return cls(WorldShape(1, 1, 1), 0, {kind: RankGroup(kind, (0,), None) for kind in GroupKind})

    @classmethod
    def create(cls, shape: WorldShape, timeout: timedelta) -> "Mesh":
        """Creates the groups; collective, so that all ranks call it at the same point."""
        rank, groups = dist.get_rank(), {}
        for kind, ranks in group_layout(shape):
            handle = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                groups[kind] = RankGroup(kind, ranks, handle)
        return cls(shape, rank, groups)
