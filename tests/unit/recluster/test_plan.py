"""Plans against a simulation: after all pieces are copied, every rank holds what its new place asks for."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config import WorldShape
from moe_dist.distributed.mesh import Coordinates, coordinates_of, rank_at
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.recluster.migration_plan import Holdings, MigrationPlan, Piece, PieceKind, TensorKey, plan_layer

Array = npt.NDArray[np.float64]
RESIDUALS, BASES = {"u": 3, "v": 5}, {"b": 7}
ITEMSIZE = {PieceKind.WEIGHT: 2, PieceKind.MASTER: 4}


def _cut(length: int, parts: int, shift: int) -> tuple[tuple[int, int], ...]:
    """[0, length) in `parts` consecutive runs, as flat partitions cut parameters; some may be empty."""
    ends = [0, *sorted(min(length, max(0, (length * i) // parts + shift)) for i in range(1, parts)), length]
    return tuple(pairwise(ends))


def _holdings(shape: WorldShape, placement: ExpertPlacement, partitioned: bool, shift: int) -> Holdings:
    runs: dict[bool, dict[TensorKey, Any]] = {True: {}, False: {}}
    for shared, widths in ((False, RESIDUALS), (True, BASES)):
        replicas = shape.data * (shape.shard if shared else 1)
        for local in range(placement.clusters_per_block):
            for name, width in widths.items():
                length = width if shared else width * placement.slots_per_shard
                for kind in ITEMSIZE:
                    whole = kind is PieceKind.WEIGHT or not partitioned
                    owned = ((0, length),) * replicas if whole else _cut(length, replicas, shift)
                    runs[shared][TensorKey(0, local, name, kind)] = owned
    return Holdings(RESIDUALS, BASES, ITEMSIZE, runs[False], runs[True])


def _contents(rank: int, shape: WorldShape, placement: ExpertPlacement, holdings: Holdings) -> dict[TensorKey, Array]:
    """What a rank should hold: numbers that tell expert (or cluster), name, kind and element."""
    at, held = coordinates_of(shape, rank), {}
    for cell, owned in {**holdings.residual_runs, **holdings.base_runs}.items():
        cluster = placement.clusters_of_block(at.cluster)[cell.local]
        tag = 1000 * list(ITEMSIZE).index(cell.kind) + 100 * "uvb".index(cell.name)
        if cell.name in BASES:
            whole = [(100 + cluster) * 10_000 + tag + i for i in range(BASES[cell.name])]
            first, end = owned[at.data * shape.shard + at.shard]
        else:
            width = RESIDUALS[cell.name]
            experts = placement.experts_of(cluster, at.shard)
            whole = [expert * 10_000 + tag + i for expert in experts for i in range(width)]
            first, end = owned[at.data]
        held[cell] = np.array(whole[first:end], dtype=np.float64)
    return held


def _first(cell: TensorKey, rank: int, shape: WorldShape, holdings: Holdings) -> int:
    at = coordinates_of(shape, rank)
    if cell.name in BASES:
        return holdings.base_runs[cell][at.data * shape.shard + at.shard][0]
    return holdings.residual_runs[cell][at.data][0]


@st.composite
def changes(draw: st.DrawFn) -> tuple[WorldShape, ExpertPlacement, ExpertPlacement]:
    shape = WorldShape(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    per_block, slots = draw(st.integers(1, 2)), shape.shard * draw(st.integers(1, 3))
    clusters = shape.cluster * per_block
    old = ExpertPlacement.contiguous(clusters * slots, clusters, shape)

    def shuffled() -> ExpertPlacement:
        order = draw(st.permutations(range(old.experts)))
        blocks = draw(st.permutations(old.block_of_cluster))
        members = tuple(tuple(order[c * slots : (c + 1) * slots]) for c in range(clusters))
        return old.with_members(members).with_blocks(blocks)

    return shape, shuffled(), shuffled()


@settings(max_examples=150)
@given(changes(), st.booleans(), st.integers(-3, 3))
def test_carrying_all_pieces_makes_every_rank_right(
    change: tuple[WorldShape, ExpertPlacement, ExpertPlacement], partitioned: bool, shift: int
) -> None:
    shape, old, new = change
    holdings = _holdings(shape, old, partitioned, shift)
    plan = MigrationPlan(tuple(plan_layer(0, old, new, shape, holdings)), ITEMSIZE)
    before = [_contents(rank, shape, old, holdings) for rank in range(shape.ranks)]
    after = [{cell: values.copy() for cell, values in held.items()} for held in before]
    written: set[tuple[int, TensorKey, int]] = set()
    for p in plan.pieces:
        start = p.start - _first(p.source, p.source_rank, shape, holdings)
        target = p.target_start - _first(p.target, p.target_rank, shape, holdings)
        assert start >= 0 <= target
        values = before[p.source_rank][p.source][start : start + p.length]
        assert len(values) == p.length
        after[p.target_rank][p.target][target : target + p.length] = values
        elements = {(p.target_rank, p.target, target + i) for i in range(p.length)}
        assert not elements & written, "an element is written twice"
        written |= elements
    for rank in range(shape.ranks):
        for cell, expected in _contents(rank, shape, new, holdings).items():
            np.testing.assert_array_equal(after[rank][cell], expected, err_msg=f"rank {rank}, {cell}")


@given(changes())
def test_what_does_not_move_is_not_sent(change: tuple[WorldShape, ExpertPlacement, ExpertPlacement]) -> None:
    shape, old, _ = change
    holdings = _holdings(shape, old, True, 0)
    assert list(plan_layer(0, old, old, shape, holdings)) == []
    same = old.with_members(old.members)
    assert list(plan_layer(0, old, same, shape, holdings)) == [], "a version alone moves nothing"


def test_every_rank_finds_its_part_and_the_bytes_add_up() -> None:
    shape = WorldShape(2, 2, 1)
    old = ExpertPlacement.contiguous(8, 2, shape)
    new = old.with_members(((0, 1, 2, 4), (3, 5, 6, 7)))
    plan = MigrationPlan(tuple(plan_layer(0, old, new, shape, _holdings(shape, old, False, 0))), ITEMSIZE)
    one_expert = sum(RESIDUALS.values()) * sum(ITEMSIZE.values())
    assert plan.bytes == 4 * one_expert, "two experts, two replicas; a base stays"
    for data in range(2):
        a, b = (rank_at(shape, Coordinates(data, cluster, 0)) for cluster in range(2))
        assert set(plan.sends(a)) == set(plan.receives(a)) == {b}
        assert plan.bytes_between(a, b) == one_expert
        assert {piece.expert for piece in plan.sends(a)[b]} == {3}
        assert {piece.expert for piece in plan.receives(a)[b]} == {4}
        assert plan.stays(a) == []


def test_bytes_are_those_that_leave_their_rank() -> None:
    """Ten elements stay on rank 0, three float32 and two bfloat16 ones go to rank 1, one float32 comes back."""
    keys = {kind: TensorKey(0, 0, "name", kind) for kind in (PieceKind.WEIGHT, PieceKind.MASTER)}
    pieces = tuple(
        Piece(0, source, keys[kind], 0, target, keys[kind], 0, length)
        for source, target, kind, length in (
            (0, 0, PieceKind.MASTER, 10),
            (0, 1, PieceKind.WEIGHT, 2),
            (0, 1, PieceKind.MASTER, 3),
            (1, 0, PieceKind.MASTER, 1),
        )
    )
    plan = MigrationPlan(pieces, {PieceKind.WEIGHT: 2, PieceKind.MASTER: 4})
    assert plan.bytes_between(0, 1) == 2 * 2 + 3 * 4
    assert plan.bytes == 16 + 4
    assert [piece.length for piece in plan.sends(0)[1]] == [3, 2], "wide elements first"
    assert (list(plan.sends(1)), list(plan.receives(0)), len(plan.stays(0)), plan.stays(1)) == ([0], [1], 1, [])
