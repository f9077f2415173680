"""Assignment of ranks to nodes, and the process groups that span several nodes. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from moe_dist.config import WorldShape
from moe_dist.distributed.mesh import GroupKind, group_layout


@dataclass(frozen=True)
class Crossing:
    """Node boundaries that one kind of group crosses.

    Attributes:
        kind: kind of group; None: the group of all ranks.
        groups: number of groups of this kind.
        ranks: number of ranks of each group.
        crossing: number of groups with ranks on more than one node.
        pairs, pairs_between_nodes: unordered pairs of ranks that communicate in these groups, and those of them on
            different nodes.
    """

    kind: GroupKind | None
    groups: int
    ranks: int
    crossing: int
    pairs: int
    pairs_between_nodes: int


def nodes_of_ranks(ranks_of_node: Sequence[int]) -> tuple[int, ...]:
    """Return the node of each rank; ranks are numbered node by node."""
    return tuple(node for node, ranks in enumerate(ranks_of_node) for _ in range(ranks))


def crossings(shape: WorldShape, node_of_rank: Sequence[int]) -> list[Crossing]:
    """Return one entry for each kind of group, in the order of `GroupKind`, then one for the group of all ranks.

    With pipeline stages the latter is missing: no gradients are summed over all ranks.
    """
    groups: dict[GroupKind | None, list[tuple[int, ...]]] = {}
    for kind, ranks in group_layout(shape):
        groups.setdefault(kind, []).append(ranks)
    if GroupKind.STAGE not in groups:
        groups[None] = [tuple(range(shape.ranks))]
    return [_crossing(kind, members, node_of_rank) for kind, members in groups.items()]


def _crossing(kind: GroupKind | None, groups: list[tuple[int, ...]], node_of_rank: Sequence[int]) -> Crossing:
    pairs = [(node_of_rank[a], node_of_rank[b]) for ranks in groups for a, b in combinations(ranks, 2)]
    crossing = sum(len({node_of_rank[rank] for rank in ranks}) > 1 for ranks in groups)
    return Crossing(kind, len(groups), len(groups[0]), crossing, len(pairs), sum(a != b for a, b in pairs))
