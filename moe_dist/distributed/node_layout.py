"""Where the ranks of a world lie on nodes, and which of their groups must reach across nodes; pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from moe_dist.config import WorldShape
from moe_dist.distributed.mesh import GroupKind, group_layout


@dataclass(frozen=True)
class Crossing:
    """What one kind of group has to cross.

    Attributes:
        kind: of the groups; None: the one group of all ranks.
        groups: how many there are.
        ranks: in each of them.
        crossing: groups whose ranks are on more than one node.
        pairs, pairs_between_nodes: unordered pairs of ranks that talk to each other in these groups.
    """

    kind: GroupKind | None
    groups: int
    ranks: int
    crossing: int
    pairs: int
    pairs_between_nodes: int


def nodes_of_ranks(ranks_of_node: Sequence[int]) -> tuple[int, ...]:
    """The node of each rank, ranks being numbered node by node."""
    return tuple(node for node, ranks in enumerate(ranks_of_node) for _ in range(ranks))


def crossings(shape: WorldShape, node_of_rank: Sequence[int]) -> list[Crossing]:
    """One entry for each kind of group in the order of `GroupKind`, then one for all ranks together."""
    groups: dict[GroupKind | None, list[tuple[int, ...]]] = {}
    for kind, ranks in group_layout(shape):
        groups.setdefault(kind, []).append(ranks)
    groups[None] = [tuple(range(shape.ranks))]
    return [_crossing(kind, members, node_of_rank) for kind, members in groups.items()]


def _crossing(kind: GroupKind | None, groups: list[tuple[int, ...]], node_of_rank: Sequence[int]) -> Crossing:
    pairs = [(node_of_rank[a], node_of_rank[b]) for ranks in groups for a, b in combinations(ranks, 2)]
    crossing = sum(len({node_of_rank[rank] for rank in ranks}) > 1 for ranks in groups)
    return Crossing(kind, len(groups), len(groups[0]), crossing, len(pairs), sum(a != b for a, b in pairs))
