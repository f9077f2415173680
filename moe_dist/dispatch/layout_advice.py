"""All-to-all bytes of a layout beside flat routing of the same tokens, and advice where a layout sends more.

Flat routing is that of a standard layer over the same ranks: a copy of each token to each of its k experts. (The m * k
experts of a token at m > 1 would take m times as much.) Expectations are over uniform routing.

Symbols: P ranks of a group, G clusters, L clusters of a rank, N experts of a cluster, m top_clusters, k top_k.
"""

from math import comb

from moe_dist.config import ModelConfig, MoEConfig, RunConfig, WorldShape
from moe_dist.dispatch.traffic_ledger import Stage
from moe_dist.dispatch.traffic_model import HopCost, flat_cost, hop_costs, ranks_of

SHARE_OF_ONE_CLUSTER = 0.55
"""Largest share of flat top-2 routing's bytes that a layout with one cluster a token may send and count as good."""


def expected_bytes(model: ModelConfig, moe: MoEConfig, shape: WorldShape) -> float:
    """Return the bytes per token and layer that ranks of this layout send each other, forward and backward."""
    return sum(_rows(cost, moe, shape) * cost.row_bytes for cost in hop_costs(model, moe, shape))


def flat_bytes(model: ModelConfig, moe: MoEConfig, shape: WorldShape) -> float:
    """Return the same for flat routing over the ranks that together hold all experts once."""
    ranks = shape.cluster * shape.shard
    return moe.top_k * (1 - 1 / ranks) * flat_cost(model, moe, shape).row_bytes


def _rows(cost: HopCost, moe: MoEConfig, shape: WorldShape) -> float:
    """Return the expected rows per token that leave their rank in one exchange."""
    others = 1 - 1 / ranks_of(cost.stage, shape)
    if cost.stage is Stage.FLAT:
        return moe.layer_kind.copies(moe) * others
    if cost.stage is Stage.ONE:
        return shape.cluster * others * _needed(moe.clusters, moe.clusters // shape.cluster, moe.top_clusters)
    if shape.sliced:
        return moe.top_clusters * shape.shard * others
    per_shard = moe.experts_per_cluster // shape.shard
    return moe.top_clusters * shape.shard * others * _needed(moe.experts_per_cluster, per_shard, moe.top_k)


def _needed(total: int, held: int, chosen: int) -> float:
    """Return the probability that a rank with `held` of `total` things has at least one of `chosen`."""
    return 1 - comb(total - held, chosen) / comb(total, chosen)


def sends_little(config: RunConfig, shape: WorldShape) -> bool:
    """Return True if the layout's bytes are at most 0.55 of flat routing's (m = 1), or no more than those (m > 1)."""
    model, moe = config.model, config.moe
    if not moe.layer_kind.clustered or shape.cluster * shape.shard == 1:
        return True
    largest = SHARE_OF_ONE_CLUSTER if moe.top_clusters == 1 else 1.0
    return expected_bytes(model, moe, shape) <= largest * flat_bytes(model, moe, shape)


def layout_advice(config: RunConfig, shape: WorldShape) -> str | None:
    """Return one line if the layout sends more than flat routing would, with a layout that sends less; else None."""
    model, moe = config.model, config.moe
    if not moe.layer_kind.clustered or shape.cluster * shape.shard == 1:
        return None
    sent, flat = expected_bytes(model, moe, shape), flat_bytes(model, moe, shape)
    if sent <= flat:
        return None
    better = min(_alternatives(moe, shape), key=lambda other: (expected_bytes(model, moe, other), -other.cluster))
    return (
        f"{shape} sends {sent:,.0f} bytes of all-to-all a token and layer, flat top-{moe.top_k} routing {flat:,.0f}: "
        f"world.cluster={better.cluster} world.shard=1 sends {expected_bytes(model, moe, better):,.0f}"
    )


def _alternatives(moe: MoEConfig, shape: WorldShape) -> list[WorldShape]:
    """Return layouts of as many ranks without a shard axis, with more than one block of clusters where possible."""
    blocks = [n for n in range(1, moe.clusters + 1) if moe.clusters % n == 0 and shape.stage_ranks % n == 0]
    return [WorldShape(shape.stage_ranks // n, n, 1) for n in blocks[1:] or blocks]
