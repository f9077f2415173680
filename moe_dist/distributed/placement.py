"""Expert placement: the cluster, slot and rank of each expert, as one versioned immutable value."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_dist.config import WorldShape


class Seat(NamedTuple):
    """Location of an expert: block and shard (its ranks), and local cluster and slot on these ranks."""

    block: int
    shard: int
    local: int
    slot: int


@dataclass(frozen=True)
class ExpertPlacement:
    """Balanced clusters of experts on a grid of (cluster block, shard) ranks.

    Slot s of every cluster is on shard s // (E/G/shards) of the cluster's block; if `shards` is 1, on all its ranks.

    Attributes:
        members: `members[c][s]` is the expert in slot s of cluster c; every cluster has E/G slots.
        block_of_cluster: cluster block that holds each cluster; all blocks hold equally many.
        blocks: number of cluster blocks.
        shards: number of shards of a block.
        version: number of changes since the initial placement.
    """

    members: tuple[tuple[int, ...], ...]
    block_of_cluster: tuple[int, ...]
    blocks: int
    shards: int
    version: int = 0

    def __post_init__(self) -> None:
        experts = sorted(expert for cluster in self.members for expert in cluster)
        if experts != list(range(len(experts))):
            raise ValueError(f"placement must hold every expert exactly once, holds {experts}")
        if len({len(cluster) for cluster in self.members}) != 1:
            raise ValueError(f"clusters must be equally large, are {[len(cluster) for cluster in self.members]}")
        per_block = [self.block_of_cluster.count(block) for block in range(self.blocks)]
        placed = len(self.block_of_cluster) == len(self.members) == sum(per_block)
        if not placed or len(set(per_block)) != 1:
            raise ValueError(f"{len(self.members)} clusters must fill {self.blocks} blocks equally, fill {per_block}")
        if self.slots % self.shards:
            raise ValueError(f"{self.slots} slots of a cluster cannot be divided over {self.shards} shards")

    @classmethod
    def contiguous(cls, experts: int, clusters: int, shape: WorldShape) -> "ExpertPlacement":
        """Return the initial placement of a run: experts and clusters in numerical order."""
        slots, per_block = experts // clusters, clusters // shape.cluster
        members = tuple(tuple(range(c * slots, (c + 1) * slots)) for c in range(clusters))
        return cls(members, tuple(c // per_block for c in range(clusters)), shape.cluster, shape.expert_shards)

    @property
    def clusters(self) -> int:
        """Number of clusters (G)."""
        return len(self.members)

    @property
    def slots(self) -> int:
        """Number of experts in a cluster (E/G)."""
        return len(self.members[0])

    @property
    def experts(self) -> int:
        """Number of experts (E)."""
        return self.clusters * self.slots

    @property
    def clusters_per_block(self) -> int:
        """Number of clusters of a block."""
        return self.clusters // self.blocks

    @property
    def slots_per_shard(self) -> int:
        """Number of experts of one cluster that one rank holds."""
        return self.slots // self.shards

    def home_of(self, cluster: int) -> int:
        """Return the block that holds a cluster in the initial placement."""
        return cluster // self.clusters_per_block

    @property
    def at_home(self) -> bool:
        """True if every cluster is on its initial block."""
        return all(self.home_of(cluster) == block for cluster, block in enumerate(self.block_of_cluster))

    def clusters_of_block(self, block: int) -> tuple[int, ...]:
        """Return the clusters of one block, in the order of their local index."""
        return tuple(c for c in range(self.clusters) if self.block_of_cluster[c] == block)

    def clusters_in_block_order(self) -> list[int]:
        """Return all clusters in the order of the blocks that hold them."""
        return [cluster for block in range(self.blocks) for cluster in self.clusters_of_block(block)]

    def experts_of(self, cluster: int, shard: int) -> tuple[int, ...]:
        """Return the experts of a cluster that one shard holds, in the order of their slots."""
        first = shard % self.shards * self.slots_per_shard
        return self.members[cluster][first : first + self.slots_per_shard]

    def local_index(self, cluster: int) -> int:
        """Return the index of a cluster among the clusters of its block."""
        return self.clusters_of_block(self.block_of_cluster[cluster]).index(cluster)

    def seats(self) -> dict[int, Seat]:
        """Return the location of every expert."""
        found = {}
        for cluster, members in enumerate(self.members):
            block, local = self.block_of_cluster[cluster], self.local_index(cluster)
            for slot, expert in enumerate(members):
                shard, slot_there = divmod(slot, self.slots_per_shard)
                found[expert] = Seat(block, shard, local, slot_there)
        return found

    def cluster_of(self) -> tuple[int, ...]:
        """Return the cluster of every expert, by expert."""
        found = {expert: cluster for cluster, members in enumerate(self.members) for expert in members}
        return tuple(found[expert] for expert in range(self.experts))

    def with_blocks(self, block_of_cluster: Sequence[int]) -> "ExpertPlacement":
        """Return the next version, with whole clusters on other blocks."""
        return replace(self, block_of_cluster=tuple(block_of_cluster), version=self.version + 1)

    def with_members(self, members: tuple[tuple[int, ...], ...]) -> "ExpertPlacement":
        """Return the next version, with experts in other clusters or slots."""
        return replace(self, members=members, version=self.version + 1)

    def digest(self) -> str:
        """Return a hash of the content, by which ranks check that their placements are equal."""
        content = [self.members, self.block_of_cluster, self.blocks, self.shards, self.version]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
