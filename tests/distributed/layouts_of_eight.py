"""`make layouts-8`: twelve layouts of eight ranks train like one rank, with experts and clusters moved in between."""

from functools import cache

import pytest
from torch import Tensor

from moe_dist.config import WorldShape, load_config
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.recluster.migration_executor import MigrationExecutor, Move
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import CLUSTERED, OTHERS, SMALL, Trained, _assert_alike, _train_variant

pytestmark = pytest.mark.timeout(900)
LAYOUTS = [
    WorldShape(2, 4, 1),
    WorldShape(2, 2, 2),
    WorldShape(4, 2, 1, replicas=2),
    WorldShape(1, 4, 2, sliced=True),
    WorldShape(2, 4, 1, tensor=2),
    WorldShape(2, 4, 1, context=4),
    WorldShape(1, 4, 2, tensor=2, context=2),
    WorldShape(2, 2, 1, tensor=2, pipeline=2),
    WorldShape(1, 4, 1, pipeline=2, chunks=2),
    WorldShape(1, 2, 1, pipeline=4),
    WorldShape(2, 2, 1, context=2, pipeline=2),
    WorldShape(2, 1, 2, tensor=2, context=2, pipeline=2, chunks=2),
]
REGROUPED = [CLUSTERED[0], CLUSTERED[2], CLUSTERED[3], CLUSTERED[5]]
"""ZeRO 0, 1 and 2, one and two clusters a token, recomputation; all with two micro-batches or more on one rank."""
VARIANTS = [*REGROUPED, OTHERS[1], OTHERS[2], OTHERS[3]]
MOVES: list[Move] = [(0, (0, 5)), (1, (1, 6, 11)), (2, (2, 13)), (3, (0, 9, 14))]
"""Experts that exchange their slots, by layer: sixteen, four in each of four clusters."""


def _regroup(engine: DeepSpeedEngine, step: int, sequences_BS: Tensor) -> None:
    """Move experts between clusters before step 2, and every cluster to the block of another before step 3."""
    placements = engine.model.context.placements
    if step not in (2, 3) or not engine.config.moe.layer_kind.clustered or engine.model.context.mesh.shape.sliced:
        return
    executor, several = MigrationExecutor(engine, largest_increase=1e9), engine.model.context.mesh.shape.cluster > 1
    if step == 2:
        moved, _, _ = executor.exchange(MOVES, sequences_BS)
        assert moved == MOVES
    else:
        blocks = [(*one.block_of_cluster[1:], one.block_of_cluster[0]) for one in placements]
        assert (executor.relocate(blocks) > 0) is several
        assert [one.block_of_cluster for one in placements] == blocks


def _train(shape: WorldShape, variants: list[list[str]], regrouped: bool) -> list[Trained]:
    axes = [f"world.{axis}={getattr(shape, axis)}" for axis in ("tensor", "context", "pipeline")]
    layout = [*axes, f"world.virtual_pipeline={shape.chunks}", "model.layers=4"]
    before = _regroup if regrouped else lambda *_: None
    return [_train_variant(shape, load_config(None, [*SMALL, *layout, *words]), before) for words in variants]


@cache
def _reference(regrouped: bool) -> list[Trained]:
    (trained,) = run_ranks(_train, 1, WorldShape(1, 1, 1), VARIANTS, regrouped, timeout=600)
    return list(trained)


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_layouts_of_eight_train_like_one_rank(shape: WorldShape) -> None:
    turn = LAYOUTS.index(shape)
    variants = [words for words in REGROUPED if words is not REGROUPED[turn % 4]]
    variants += [] if shape.sliced else [VARIANTS[4 + turn % 3]]
    outcomes = run_ranks(_train, shape.ranks, shape, variants, not shape.sliced, timeout=600)
    for number, words in enumerate(variants):
        expected, seen = _reference(not shape.sliced)[VARIANTS.index(words)], set[str]()
        assert all(norm > 0.5 for norm in expected.norms), "the clipping must act, or it is not tested"
        for rank, trained in enumerate(outcomes):
            held = trained[number].weights
            seen |= set(held)
            if shape.sliced:  # slices show in the next losses and norms
                whole = expected.weights
                trained[number].weights = {n: value for n, value in held.items() if value.shape == whole[n].shape}
            _assert_alike(trained[number], expected, f"{words}, rank {rank}")
        assert seen == set(expected.weights), f"{words}: every weight must be held by some rank"
