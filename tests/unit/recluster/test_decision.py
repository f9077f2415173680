"""Decisions: planted groups are found, little gains move nobody, limits hold."""

import numpy as np
import numpy.typing as npt
import pytest

from moe_dist.clustering import adjusted_rand_index, cluster_quality
from moe_dist.config import ReclusterConfig, WorldShape
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.recluster.decision import decide_blocks, decide_layer
from moe_dist.recluster.exchange import apply_exchanges

EVERYTHING = ReclusterConfig(period=1, threshold=0.0, max_moved=1.0)


def _planted(experts: int, clusters: int, seed: int, noise: float) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Similarities of experts that belong to hidden groups, scattered over the expert numbers."""
    rng = np.random.default_rng(seed)
    group_E = rng.permutation(np.repeat(np.arange(clusters), experts // clusters))
    alike = (group_E[:, None] == group_E[None, :]) + noise * rng.standard_normal((experts, experts))
    return (alike + alike.T) / 2, group_E.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found(seed: int) -> None:
    similarity_EE, group_E = _planted(32, 4, seed, noise=0.3)
    placement = ExpertPlacement.contiguous(32, 4, WorldShape(1, 4, 1))
    decision = decide_layer(similarity_EE, placement, np.ones(32), EVERYTHING, seed)
    after = apply_exchanges(placement, decision.cycles)
    assert adjusted_rand_index(after.cluster_of(), group_E) == 1.0
    assert decision.objective_after > decision.objective_before
    assert decision.objective_after == pytest.approx(cluster_quality(similarity_EE, after.cluster_of()).objective)


def test_a_good_clustering_stays() -> None:
    similarity_EE = np.kron(np.eye(4), np.ones((8, 8)))
    placement = ExpertPlacement.contiguous(32, 4, WorldShape(1, 4, 1))
    decision = decide_layer(similarity_EE, placement, np.ones(32), EVERYTHING, 0)
    assert decision.cycles == ()
    assert decision.objective_after == decision.objective_before


def test_gains_below_the_threshold_move_nobody() -> None:
    similarity_EE, _ = _planted(32, 4, 0, noise=0.1)
    placement = ExpertPlacement.contiguous(32, 4, WorldShape(1, 4, 1))
    scaled = 0.01 * similarity_EE  # a mover can gain at most 0.01 or so
    hesitant = EVERYTHING.model_copy(update={"threshold": 0.05})
    assert decide_layer(scaled, placement, np.ones(32), EVERYTHING, 0).cycles
    assert decide_layer(scaled, placement, np.ones(32), hesitant, 0).cycles == ()


@pytest.mark.parametrize("share", [0.07, 0.1, 0.25, 0.5])
def test_no_more_than_a_share_of_the_experts_moves(share: float) -> None:
    similarity_EE, _ = _planted(32, 4, 1, noise=0.3)
    placement = ExpertPlacement.contiguous(32, 4, WorldShape(1, 4, 1))
    limited = EVERYTHING.model_copy(update={"max_moved": share})
    decision = decide_layer(similarity_EE, placement, np.ones(32), limited, 0)
    moved = sum(map(len, decision.cycles))
    assert 0 < moved <= share * 32
    assert decision.objective_after > decision.objective_before


def test_heavy_experts_part_where_equal_load_has_a_price() -> None:
    placement = ExpertPlacement.contiguous(8, 2, WorldShape(1, 2, 1))
    load_E = np.array([4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0])
    priced = EVERYTHING.model_copy(update={"load_weight": 1.0})
    after = apply_exchanges(placement, decide_layer(np.zeros((8, 8)), placement, load_E, priced, 0).cycles)
    loads = np.bincount(after.cluster_of(), weights=load_E)
    assert loads[0] == loads[1]


def test_clusters_that_tokens_choose_together_share_a_rank() -> None:
    placement = ExpertPlacement.contiguous(16, 8, WorldShape(1, 4, 1))
    together_GG = np.ones((8, 8))
    for a, b in ((0, 5), (1, 7), (2, 4), (3, 6)):
        together_GG[a, b] = together_GG[b, a] = 50.0
    blocks = decide_blocks(together_GG, placement, 0)
    assert sorted(blocks) == sorted(placement.block_of_cluster)
    assert all(blocks[a] == blocks[b] for a, b in ((0, 5), (1, 7), (2, 4), (3, 6)))


@pytest.mark.parametrize("together_GG", [np.ones((8, 8)), np.zeros((8, 8))])
def test_no_relocation_without_gain(together_GG: npt.NDArray[np.float64]) -> None:
    placement = ExpertPlacement.contiguous(16, 8, WorldShape(1, 4, 1))
    assert decide_blocks(together_GG, placement, 0) == placement.block_of_cluster


def _pairs(gains: list[float]) -> npt.NDArray[np.float64]:
    """Similarities of two-expert clusters (0, 1), (2, 3), ...: in each two of them a swap gains each mover as much."""
    similarity_EE = np.zeros((4 * len(gains), 4 * len(gains)))
    for number, gain in enumerate(gains):
        first = 4 * number
        for a, b in ((first, first + 2), (first + 1, first + 3)):
            similarity_EE[a, b] = similarity_EE[b, a] = gain
    return similarity_EE


@pytest.mark.parametrize(("threshold", "movers"), [(0.49, 2), (0.51, 0), (0.99, 0)])
def test_the_threshold_is_the_gain_of_a_mover_s_mean_similarity(threshold: float, movers: int) -> None:
    """A mover has one companion: similarity 0 before the swap and 0.5 after it, so the gain is 0.5."""
    placement = ExpertPlacement.contiguous(4, 2, WorldShape(1, 2, 1))
    limits = EVERYTHING.model_copy(update={"threshold": threshold})
    cycles = decide_layer(_pairs([0.5]), placement, np.ones(4), limits, 0).cycles
    assert sum(map(len, cycles)) == movers, f"a gain of 0.5 against a threshold of {threshold}"


def test_the_best_exchange_comes_first() -> None:
    placement = ExpertPlacement.contiguous(8, 4, WorldShape(1, 4, 1))
    one = EVERYTHING.model_copy(update={"max_moved": 0.25})  # two of eight experts: a single exchange
    (cycle,) = decide_layer(_pairs([0.2, 0.6]), placement, np.ones(8), one, 0).cycles
    assert set(cycle) <= {4, 5, 6, 7}, f"the exchange that gains 0.6 is made, not the one that gains 0.2: {cycle}"
    both = decide_layer(_pairs([0.2, 0.6]), placement, np.ones(8), EVERYTHING, 0)
    assert [min(cycle) >= 4 for cycle in both.cycles] == [True, False]
    assert both.objective_before == 0
    assert both.objective_after == pytest.approx((0.2 + 0.6) / 2), "the mean over pairs of companions"


def test_an_exchange_of_too_many_leaves_room_for_smaller_ones() -> None:
    """Three experts go round, gaining 0.9, and two swap, gaining 0.3; two of twelve may move."""
    similarity_EE = np.zeros((12, 12))
    for a, b in ((0, 3), (2, 5), (4, 1)):
        similarity_EE[a, b] = similarity_EE[b, a] = 0.9
    similarity_EE[6:10, 6:10] = _pairs([0.3])
    similarity_EE[10, 11] = similarity_EE[11, 10] = 1.0
    placement = ExpertPlacement.contiguous(12, 6, WorldShape(1, 6, 1))
    all_moves = decide_layer(similarity_EE, placement, np.ones(12), EVERYTHING, 0).cycles
    assert sorted(map(len, all_moves)) == [2, 3]
    limited = EVERYTHING.model_copy(update={"max_moved": 2 / 12})
    (cycle,) = decide_layer(similarity_EE, placement, np.ones(12), limited, 0).cycles
    assert set(cycle) <= {6, 7, 8, 9}


@pytest.mark.parametrize(("apart", "moves"), [(0.96, True), (0.99, False)])
def test_a_relocation_must_bring_two_in_a_hundred_pairs_together(apart: float, moves: bool) -> None:
    """Clusters 0, 1 and 2, 3 share ranks, and a share of the pairs; all other pairs are of clusters 0 and 2."""
    placement = ExpertPlacement.contiguous(8, 4, WorldShape(1, 2, 1))
    together_GG = np.zeros((4, 4))
    half = apart / 2
    for a, b, share in ((0, 1, half), (0, 2, 1 - half), (1, 3, 0.0), (2, 3, 0.0)):
        together_GG[a, b] = together_GG[b, a] = share
    together_GG /= together_GG.sum()
    np.fill_diagonal(together_GG, 1.0)  # a cluster with itself is no pair
    gain = (1 - half) - half
    assert (gain >= 0.02) is moves
    assert (decide_blocks(together_GG, placement, 0) != placement.block_of_cluster) is moves


def test_an_exchange_is_judged_by_what_was_moved_before_it() -> None:
    """Experts 0 and 1 belong together, and 5 and 6: the second exchange harms alone, and gains after the first."""
    similarity_EE = np.zeros((10, 10))
    pairs = {(0, 1): 1.0, (5, 6): 1.0, (5, 2): 1.5, (0, 7): 1.5, (6, 2): 0.9, (1, 7): 0.9}
    cores = {(a, b): 4.0 for core in ((2, 3, 4), (7, 8, 9)) for a in core for b in core if a < b}
    for (a, b), value in (pairs | cores).items():
        similarity_EE[a, b] = similarity_EE[b, a] = value
    placement = ExpertPlacement.contiguous(10, 2, WorldShape(1, 2, 1))
    cycles = decide_layer(similarity_EE, placement, np.ones(10), EVERYTHING, 0).cycles
    assert [set(cycle) for cycle in cycles] == [{0, 5}, {1, 6}]
