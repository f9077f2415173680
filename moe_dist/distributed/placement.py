"""Which cluster, slot and rank hold each expert: one versioned value that every other part reads."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_dist.config import WorldShape


class Seat(NamedTuple):
    """Where an expert sits: on the ranks of which block and shard, and there in which local cluster and slot."""

    block: int
    shard: int
    local: int
    slot: int


@dataclass(frozen=True)
class ExpertPlacement:
    """Balanced clusters of experts on a grid of (cluster block, shard) ranks.

    `members[c][s]` is the expert in slot s of cluster c; every cluster has E/G slots. Cluster c lives on cluster block
    `block_of_cluster[c]`, every block holding equally many; inside a block, slot s lives on shard s // (E/G/shards).
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
        """The placement a run starts from: experts and clusters in their numbers' order."""
        slots, per_block = experts // clusters, clusters // shape.cluster
        members = tuple(tuple(range(c * slots, (c + 1) * slots)) for c in range(clusters))
        return cls(members, tuple(c // per_block for c in range(clusters)), shape.cluster, shape.shard)

    @property
    def clusters(self) -> int:
        """Clusters in all (G)."""
        return len(self.members)

    @property
    def slots(self) -> int:
        """Experts in a cluster (E/G)."""
        return len(self.members[0])

    @property
    def experts(self) -> int:
        """Experts in all (E)."""
        return self.clusters * self.slots

    @property
    def clusters_per_block(self) -> int:
        """Clusters that each block's ranks hold together."""
        return self.clusters // self.blocks

    @property
    def slots_per_shard(self) -> int:
        """Experts of one cluster that one rank holds."""
        return self.slots // self.shards

    def home_of(self, cluster: int) -> int:
        """The block that a run's first placement gives a cluster to."""
        return cluster // self.clusters_per_block

    @property
    def at_home(self) -> bool:
        """Whether every cluster lives where it started."""
        return all(self.home_of(cluster) == block for cluster, block in enumerate(self.block_of_cluster))

    def clusters_of_block(self, block: int) -> tuple[int, ...]:
        """The clusters that the ranks of one block hold, in the order of their local index."""
        return tuple(c for c in range(self.clusters) if self.block_of_cluster[c] == block)

    def clusters_in_block_order(self) -> list[int]:
        """Return all clusters in the order of the blocks that hold them."""
        return [cluster for block in range(self.blocks) for cluster in self.clusters_of_block(block)]

    def experts_of(self, cluster: int, shard: int) -> tuple[int, ...]:
        """The experts of a cluster that one shard holds, in the order of their slots."""
        first = shard * self.slots_per_shard
        return self.members[cluster][first : first + self.slots_per_shard]

    def local_index(self, cluster: int) -> int:
        """Which of its block's clusters a cluster is."""
        return self.clusters_of_block(self.block_of_cluster[cluster]).index(cluster)

    def seats(self) -> dict[int, Seat]:
        """The seat of every expert."""
        found = {}
        for cluster, members in enumerate(self.members):
            block, local = self.block_of_cluster[cluster], self.local_index(cluster)
            for slot, expert in enumerate(members):
                shard, slot_there = divmod(slot, self.slots_per_shard)
                found[expert] = Seat(block, shard, local, slot_there)
        return found

    def cluster_of(self) -> tuple[int, ...]:
        """The cluster of every expert, by expert."""
        found = {expert: cluster for cluster, members in enumerate(self.members) for expert in members}
        return tuple(found[expert] for expert in range(self.experts))

    def with_blocks(self, block_of_cluster: Sequence[int]) -> "ExpertPlacement":
        """The next version, after clusters have changed ranks as they are."""
        return replace(self, block_of_cluster=tuple(block_of_cluster), version=self.version + 1)

    def with_members(self, members: tuple[tuple[int, ...], ...]) -> "ExpertPlacement":
        """The next version, after a re-clustering."""
        return replace(self, members=members, version=self.version + 1)

    def digest(self) -> str:
        """Content hash that ranks compare before they rely on a placement."""
        content = [self.members, self.block_of_cluster, self.blocks, self.shards, self.version]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
