"""New clusters take over old names so that as few experts as possible move."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.clustering import match_clusters
from moe_dist.config import WorldShape
from moe_dist.distributed.placement import ExpertPlacement

Clusters = tuple[tuple[int, ...], ...]


@st.composite
def two_clusterings(draw: st.DrawFn) -> tuple[Clusters, Clusters]:
    clusters, size = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    first, second = (draw(st.permutations(range(clusters * size))) for _ in range(2))

    def cut(order: list[int]) -> Clusters:
        return tuple(tuple(order[c * size : (c + 1) * size]) for c in range(clusters))

    return cut(first), cut(second)


@given(two_clusterings())
def test_fewest_move_and_who_stays_keeps_the_slot(clusterings: tuple[Clusters, Clusters]) -> None:
    old, new = clusterings
    found = match_clusters(old, new)
    fewest = min(
        sum(len(set(after) - set(before)) for before, after in zip(old, order, strict=True))
        for order in permutations(new)
    )
    assert found.moved == fewest
    assert {frozenset(group) for group in found.members} == {frozenset(group) for group in new}
    place = {expert: (c, s) for c, cluster in enumerate(old) for s, expert in enumerate(cluster)}
    for c, cluster in enumerate(found.members):
        for s, expert in enumerate(cluster):
            stays = expert not in found.movers
            assert stays == (place[expert][0] == c)
            assert not stays or place[expert] == (c, s)


@given(two_clusterings(), st.randoms(use_true_random=False))
def test_other_names_and_orders_alone_move_nobody(
    clusterings: tuple[Clusters, Clusters], random: np.random.Generator
) -> None:
    old, _ = clusterings
    shuffled = [list(group) for group in old]
    for group in shuffled:
        random.shuffle(group)
    random.shuffle(shuffled)
    found = match_clusters(old, shuffled)
    assert (found.members, found.moved) == (old, 0)


def test_members_make_the_next_placement() -> None:
    placement = ExpertPlacement.contiguous(8, 2, WorldShape(data=1, cluster=2, shard=2))
    found = match_clusters(placement.members, ((4, 5, 6, 1), (7, 3, 2, 0)))
    assert found.members == ((0, 7, 2, 3), (4, 5, 6, 1))
    assert found.movers == (1, 7)
    assert placement.with_members(found.members).version == 1


def test_movers_fill_free_slots_in_the_order_of_their_numbers() -> None:
    found = match_clusters(((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), ((9, 2, 0, 5, 4), (1, 3, 6, 7, 8)))
    assert found.members == ((0, 5, 2, 9, 4), (1, 6, 7, 8, 3))


@pytest.mark.parametrize("groups", [((0, 1), (2, 4)), ((0, 1, 2), (3,)), ((0, 1, 2, 3),), ((0, 1), (1, 2))])
def test_other_experts_or_sizes_are_refused(groups: Clusters) -> None:
    with pytest.raises(ValueError, match="cannot be matched"):
        match_clusters(((0, 1), (2, 3)), groups)
