"""Placements after moves, on cycles long enough to tell a direction."""

from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.recluster.migration_executor import _after_relocation, after_moves, movers_of

PLACEMENT = ExpertPlacement(((0, 1), (2, 3), (4, 5)), (0, 1, 2), blocks=3, shards=1)


def test_each_cluster_of_a_cycle_takes_the_block_of_the_next() -> None:
    found = _after_relocation(PLACEMENT, (0, 1, 2))
    assert found.block_of_cluster == (1, 2, 0)
    assert found.version == 1


def test_each_expert_of_a_cycle_takes_the_slot_of_the_next_in_its_layer_alone() -> None:
    moves = [(1, (0, 2, 4)), (1, (1, 3))]
    first, second = after_moves([PLACEMENT, PLACEMENT], moves)
    assert first is PLACEMENT
    assert second.members == ((4, 3), (0, 1), (2, 5)), (
        "0 to the slot of 2, 2 to that of 4, 4 to that of 0; 1 and 3 swap"
    )
    assert movers_of(moves) == {(1, expert) for expert in range(5)}
