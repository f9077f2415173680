"""Routing strategies: the expected rows between ranks for one token of every rank.

flat          k copies of a token, each straight to its expert's rank
node-limited  experts on at most M nodes; one copy per node, which its receiver forwards inside the node
two-stage     one copy to each chosen cluster's rank; shards of a cluster are served from there

Shapes: P ranks of the expert-parallel group (cluster block x shard, the shard innermost), E experts, S sampled tokens,
K choices, B blocks.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from moe_dist.config import MoEConfig, RunConfig, WorldShape
from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage
from moe_dist.dispatch.traffic_model import HopCost, hop_costs
from moe_dist.simulator.popularity import (
    Floats,
    Integers,
    balanced_clusters,
    sample,
    scores,
    shares,
    top_choices,
    touched,
)


class Strategy(StrEnum):
    """Strategy by which tokens are sent to their experts' ranks."""

    FLAT = "flat"
    NODE_LIMITED = "node-limited"
    TWO_STAGE = "two-stage"


@dataclass(frozen=True)
class Flow:
    """One exchange: bytes of a row, and the expected rows between ranks for one token of every rank."""

    hop: HopCost
    rows_PP: Floats

    def bytes(self, tokens: float) -> Floats:
        """Return bytes_PP of `tokens` on every rank, forward and backward, by the traffic ledger's formulas."""
        found = self.hop.volumes(tokens * self.rows_PP)
        found[Payload.COUNTS, Direction.FORWARD] = found[Payload.COUNTS, Direction.FORWARD] * (self.rows_PP > 0)
        bytes_PP: Floats = np.sum(list(found.values()), axis=0)
        return bytes_PP


@dataclass(frozen=True)
class Demand:
    """Load of one layer on network and devices.

    Attributes:
        work_P: rows that each rank computes, for one token of every rank.
    """

    flows: tuple[Flow, ...]
    work_P: Floats


def demand(
    config: RunConfig,
    shape: WorldShape,
    strategy: Strategy,
    popularity_E: Floats,
    generator: np.random.Generator,
    *,
    reclustered: bool = False,
    devices_per_node: int = 8,
    most_nodes: int = 4,
) -> Demand:
    """Return the expected rows of one layer.

    Args:
        reclustered: clusters are made equally popular (two-stage).
        most_nodes: M, the largest number of nodes of a token's experts (node-limited).
    """
    if strategy is Strategy.TWO_STAGE:
        return _two_stage(config, shape, popularity_E, generator, reclustered)
    ranks = shape.cluster * shape.shard
    if strategy is Strategy.FLAT or ranks <= devices_per_node:
        return _flat(config, shape, popularity_E, generator)
    return _node_limited(config, shape, popularity_E, generator, devices_per_node, most_nodes)


def _hop(config: RunConfig, shape: WorldShape, stage: Stage) -> HopCost:
    found = [hop for hop in hop_costs(config.model, config.moe, shape) if hop.stage is stage]
    return found[0] if found else HopCost(stage, 0, 0)


def _flat(config: RunConfig, shape: WorldShape, popularity_E: Floats, generator: np.random.Generator) -> Demand:
    ranks = shape.cluster * shape.shard
    home_SK = sample(popularity_E, config.moe.top_k, generator) // (config.moe.experts // ranks)
    copies_P = np.bincount(home_SK.ravel(), minlength=ranks) / len(home_SK)
    rows_PP = np.broadcast_to(copies_P, (ranks, ranks))
    return Demand((Flow(_hop(config, shape, Stage.FLAT), rows_PP),), ranks * copies_P)


def _node_limited(
    config: RunConfig,
    shape: WorldShape,
    popularity_E: Floats,
    generator: np.random.Generator,
    devices_per_node: int,
    most_nodes: int,
) -> Demand:
    """Choose nodes by the sum of their best k/M experts' scores, as in DeepSeek-V3; groups fill whole nodes."""
    ranks = shape.cluster * shape.shard
    per_rank = config.moe.experts // ranks
    nodes = -(-ranks // devices_per_node)
    rank_E = np.arange(config.moe.experts) // per_rank
    node_E = rank_E // devices_per_node
    score_SE = scores(popularity_E, generator)
    best = max(1, config.moe.top_k // most_nodes)
    score_SN = np.stack(
        [np.sort(score_SE[:, node_E == node], axis=1)[:, -best:].sum(axis=1) for node in range(nodes)], 1
    )
    allowed_SN = touched(top_choices(score_SN, min(most_nodes, nodes)), nodes)
    choice_SK = top_choices(np.where(allowed_SN[:, node_E], score_SE, -np.inf), config.moe.top_k)
    on_node_N = shares(touched(node_E[choice_SK], nodes))
    on_rank_P = shares(touched(rank_E[choice_SK], ranks))
    copies_P = np.bincount(rank_E[choice_SK].ravel(), minlength=ranks) / len(choice_SK)
    node_P, place_P = np.divmod(np.arange(ranks), devices_per_node)
    same_place_PP = place_P[:, None] == place_P
    same_node_PP = node_P[:, None] == node_P
    hop = _hop(config, shape, Stage.FLAT)
    between_PP = same_place_PP * on_node_N[node_P]
    entered_P = np.array([(place_P == place).sum() for place in place_P])  # sources that enter a node at this rank
    inside_PP = same_node_PP * entered_P[:, None] * on_rank_P
    return Demand((Flow(hop, between_PP), Flow(hop, inside_PP)), ranks * copies_P)


def _two_stage(
    config: RunConfig, shape: WorldShape, popularity_E: Floats, generator: np.random.Generator, reclustered: bool
) -> Demand:
    moe = config.moe
    cluster_E = np.arange(moe.experts) // moe.experts_per_cluster
    if reclustered:
        cluster_E = balanced_clusters(popularity_E, moe.clusters)
    share_G: Floats = np.bincount(cluster_E, weights=popularity_E, minlength=moe.clusters).astype(np.float64)
    cluster_SK = sample(share_G, moe.top_clusters, generator)
    block_G = np.arange(moe.clusters) // (moe.clusters // shape.cluster)
    on_block_B = shares(touched(block_G[cluster_SK], shape.cluster))
    on_cluster_G = shares(touched(cluster_SK, moe.clusters))
    flows, place_P = [], np.arange(shape.cluster * shape.shard)
    block_P, shard_P = np.divmod(place_P, shape.shard)
    if shape.cluster > 1:
        rows_PP = (shard_P[:, None] == shard_P) * on_block_B[block_P]
        flows.append(Flow(_hop(config, shape, Stage.ONE), rows_PP))
    per_block_B = np.bincount(block_G, weights=on_cluster_G, minlength=shape.cluster)
    entered_B: Floats = (shape.cluster * per_block_B).astype(np.float64)
    if shape.shard == 1:
        return Demand(tuple(flows), entered_B)
    on_shard_GZ = np.stack(
        [_on_shards(moe, shape, popularity_E[cluster_E == c], generator) for c in range(moe.clusters)]
    )
    wanted_GZ = shape.cluster * on_cluster_G[:, None] * on_shard_GZ
    wanted_BZ = np.stack([wanted_GZ[block_G == block].sum(axis=0) for block in range(shape.cluster)])
    rows_PP = (block_P[:, None] == block_P) * wanted_BZ[block_P, shard_P]
    flows.append(Flow(_hop(config, shape, Stage.TWO), rows_PP))
    return Demand(tuple(flows), shape.shard * wanted_BZ.ravel())


def _on_shards(moe: MoEConfig, shape: WorldShape, popularity_N: Floats, generator: np.random.Generator) -> Floats:
    """Return the share of a cluster's rows that need each of its shards."""
    if shape.sliced:
        return np.ones(shape.shard)
    slot_SK: Integers = sample(popularity_N / popularity_N.sum(), moe.top_k, generator, tokens=1024)
    return shares(touched(slot_SK // (moe.experts_per_cluster // shape.shard), shape.shard))
