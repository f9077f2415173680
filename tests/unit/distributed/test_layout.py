"""Which groups reach across nodes, against a count over all pairs of ranks."""

from collections.abc import Callable
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import WorldShape
from moe_dist.distributed.mesh import GroupKind, coordinates_of
from moe_dist.distributed.node_layout import crossings, nodes_of_ranks

SIZES = st.integers(1, 4)
SHAPES = st.builds(WorldShape, SIZES, SIZES, SIZES)


@given(SHAPES, st.data())
def test_pairs_are_those_that_share_a_group(shape: WorldShape, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, shape.ranks), max_size=3).map(sorted))
    edges = [0, *cuts, shape.ranks]
    nodes = nodes_of_ranks([after - before for before, after in pairwise(edges)])
    found = {entry.kind: entry for entry in crossings(shape, nodes)}
    at = [coordinates_of(shape, rank) for rank in range(shape.ranks)]
    together: dict[GroupKind | None, Callable[[int, int], bool]] = {
        GroupKind.STAGE_ONE: lambda a, b: (at[a].data, at[a].shard) == (at[b].data, at[b].shard),
        GroupKind.CLUSTER: lambda a, b: (at[a].data, at[a].cluster) == (at[b].data, at[b].cluster),
        GroupKind.EXPERT_PARALLEL: lambda a, b: at[a].data == at[b].data,
        GroupKind.BASE_DATA: lambda a, b: at[a].cluster == at[b].cluster,
        GroupKind.EXPERT_DATA: lambda a, b: (at[a].cluster, at[a].shard) == (at[b].cluster, at[b].shard),
        None: lambda a, b: True,
    }
    assert found.keys() == together.keys()
    for kind, share in together.items():
        pairs = [(a, b) for a, b in combinations(range(shape.ranks), 2) if share(a, b)]
        assert found[kind].pairs == len(pairs)
        assert found[kind].pairs_between_nodes == sum(nodes[a] != nodes[b] for a, b in pairs)
        assert found[kind].groups * found[kind].ranks == shape.ranks
        assert (found[kind].crossing == 0) == (found[kind].pairs_between_nodes == 0)


@given(SHAPES, st.integers(1, 3))
def test_nodes_of_whole_clusters_keep_stage_two_inside(shape: WorldShape, clusters_on_node: int) -> None:
    whole, left = divmod(shape.ranks, shape.shard * clusters_on_node)
    nodes = nodes_of_ranks([shape.shard * clusters_on_node] * whole + [left])
    (stage_two,) = [entry for entry in crossings(shape, nodes) if entry.kind is GroupKind.CLUSTER]
    assert stage_two.crossing == 0
