"""Exchanges of seats: they lead where they should, and any selection of them is a valid change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import WorldShape
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.recluster.exchange import apply_exchanges, cycles_of, exchanges, successors


@st.composite
def clusterings(draw: st.DrawFn) -> tuple[ExpertPlacement, list[int]]:
    """A placement with experts in any order, and other clusters of the same sizes."""
    clusters, slots = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    experts = list(range(clusters * slots))
    order, other = draw(st.permutations(experts)), draw(st.permutations(experts))
    members = tuple(tuple(order[c * slots : (c + 1) * slots]) for c in range(clusters))
    new = [0] * len(experts)
    for place, expert in enumerate(other):
        new[expert] = place // slots
    return ExpertPlacement(members, (0,) * clusters, 1, 1), new


@given(clusterings())
def test_all_exchanges_lead_to_the_new_clusters(given_: tuple[ExpertPlacement, list[int]]) -> None:
    placement, new = given_
    cycles = exchanges(placement.cluster_of(), new)
    after = apply_exchanges(placement, cycles)
    assert after.cluster_of() == tuple(new)
    assert after.version == placement.version + 1
    moved = [expert for cycle in cycles for expert in cycle]
    assert sorted(moved) == [e for e in range(placement.experts) if placement.cluster_of()[e] != new[e]]
    seats = placement.seats()
    for expert, seat in after.seats().items():
        assert expert in moved or seat == seats[expert], "who does not move keeps the seat"


@given(clusterings(), st.data())
def test_any_selection_is_a_placement(given_: tuple[ExpertPlacement, list[int]], data: st.DataObject) -> None:
    placement, new = given_
    cycles = exchanges(placement.cluster_of(), new)
    chosen = [cycle for cycle in cycles if data.draw(st.booleans())]
    movers = {expert for cycle in chosen for expert in cycle}
    after = apply_exchanges(placement, chosen).cluster_of()  # the constructor refuses what is not balanced
    assert all(after[e] == (new[e] if e in movers else placement.cluster_of()[e]) for e in range(placement.experts))


def test_two_who_want_each_others_place_swap() -> None:
    assert exchanges([0, 0, 1, 1, 2, 2], [1, 0, 0, 2, 2, 1]) in ([(0, 2), (3, 5)], [(3, 5), (0, 2)])


@given(clusterings())
def test_a_permutation_says_the_same(given_: tuple[ExpertPlacement, list[int]]) -> None:
    placement, new = given_
    cycles = exchanges(placement.cluster_of(), new)
    again = cycles_of(successors(placement.experts, cycles))
    assert apply_exchanges(placement, again) == apply_exchanges(placement, cycles)
    assert sorted(map(len, again)) == sorted(map(len, cycles))


def test_clusters_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="same sizes"):
        exchanges([0, 0, 1, 1], [0, 1, 1, 1])


def test_seats_name_every_place_once() -> None:
    placement = ExpertPlacement.contiguous(16, 4, WorldShape(1, 2, 2))
    seats = placement.seats()
    assert len(set(seats.values())) == 16
    for expert, seat in seats.items():
        cluster = placement.clusters_of_block(seat.block)[seat.local]
        assert placement.experts_of(cluster, seat.shard)[seat.slot] == expert
