"""Expert placement: every expert exactly once, whatever the shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import WorldShape
from moe_dist.distributed.placement import ExpertPlacement


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_expert_lives_on_one_block_and_shard(blocks: int, per_block: int, shards: int, slots: int) -> None:
    clusters = blocks * per_block
    experts = clusters * shards * slots
    placement = ExpertPlacement.contiguous(experts, clusters, WorldShape(2, blocks, shards))
    held = [
        expert
        for block in range(blocks)
        for cluster in placement.clusters_of_block(block)
        for shard in range(shards)
        for expert in placement.experts_of(cluster, shard)
    ]
    assert sorted(held) == list(range(experts))
    assert placement.slots_per_shard == slots
    assert placement.clusters_per_block == per_block


def test_digest_tells_placements_apart() -> None:
    placement = ExpertPlacement.contiguous(4, 2, WorldShape(1, 1, 1))
    moved = placement.with_members(((0, 2), (1, 3)))
    back = moved.with_members(placement.members)
    assert len({placement.digest(), moved.digest(), back.digest()}) == 3
    assert [placement.version, moved.version, back.version] == [0, 1, 2]


@pytest.mark.parametrize(
    ("members", "blocks_of", "blocks", "shards", "complaint"),
    [
        (((0, 1), (1, 2)), (0, 0), 1, 1, "exactly once"),
        (((0, 1, 2), (3,)), (0, 0), 1, 1, "equally large"),
        (((0, 1), (2, 3)), (0, 0), 2, 1, "equally"),
        (((0, 1), (2, 3)), (0, 1), 2, 3, "shards"),
    ],
)
def test_impossible_placements_are_refused(
    members: tuple[tuple[int, ...], ...], blocks_of: tuple[int, ...], blocks: int, shards: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ExpertPlacement(members, blocks_of, blocks, shards)
