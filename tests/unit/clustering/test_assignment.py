"""The fast assignment against the exact one, against chance, against greed, and against truths that were planted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.clustering import adjusted_rand_index, assign_balanced, cluster_quality
from moe_dist.clustering.objective import affinities, pair_sum, pair_weights
from tests.oracles.balanced_clustering import balanced_clusterings, best_balanced
from tests.unit.clustering.examples import Labels, Matrix, planted_groups, planted_similarity

SMALL = [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]
shapes = st.sampled_from([(1, 1), (4, 4), (5, 1), (6, 3), (12, 3), (20, 4)])
seeds = st.integers(0, 2**31)


def draw_problem(seed: int, experts: int) -> tuple[Matrix, Matrix]:
    """A similarity without structure, not even symmetric, and loads."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(experts, experts)), rng.random(experts)


def random_labels(rng: np.random.Generator, experts: int, clusters: int) -> Labels:
    return rng.permutation(np.arange(experts) % clusters)


def greedy_labels(similarity_EE: Matrix, clusters: int) -> Labels:
    """Experts in turn join the open cluster they are most like on average; the first ones open the clusters."""
    size = len(similarity_EE) // clusters
    groups: list[list[int]] = [[c] for c in range(clusters)]
    for expert in range(clusters, len(similarity_EE)):
        best = max((g for g in groups if len(g) < size), key=lambda g: similarity_EE[expert, g].mean())
        best.append(expert)
    return np.array([next(c for c, g in enumerate(groups) if e in g) for e in range(len(similarity_EE))])


@given(seed=seeds, shape=shapes, load_weight=st.sampled_from([0.0, 0.5, 10.0]))
def test_pair_weights_are_the_objective_but_for_a_constant(
    seed: int, shape: tuple[int, int], load_weight: float
) -> None:
    similarity_EE, loads_E = draw_problem(seed, shape[0])
    weights_EE = pair_weights(similarity_EE, shape[1], loads_E, load_weight)
    rng = np.random.default_rng(seed)
    constants = []
    for _ in range(3):
        labels_E = random_labels(rng, *shape)
        found = pair_sum(affinities(weights_EE, labels_E, shape[1]), labels_E)
        constants.append(cluster_quality(similarity_EE, labels_E, loads_E, load_weight).objective - found)
    assert np.ptp(constants) <= 1e-9


@given(seed=seeds, shape=shapes, load_weight=st.sampled_from([0.0, 0.5]))
@settings(max_examples=30)
def test_clusters_are_balanced_and_no_swap_improves_them(seed: int, shape: tuple[int, int], load_weight: float) -> None:
    (experts, clusters), (similarity_EE, loads_E) = shape, draw_problem(seed, shape[0])
    found = assign_balanced(similarity_EE, clusters, seed=seed, restarts=2, loads=loads_E, load_weight=load_weight)
    assert sorted(e for group in found.groups for e in group) == list(range(experts))
    assert {len(group) for group in found.groups} == {experts // clusters}
    labels_E = np.array(found.labels)
    assert found.quality == cluster_quality(similarity_EE, labels_E, loads_E, load_weight)
    for i in range(experts):
        for j in range(i):
            swapped_E = labels_E.copy()
            swapped_E[[i, j]] = labels_E[[j, i]]
            swapped = cluster_quality(similarity_EE, swapped_E, loads_E, load_weight)
            assert swapped.objective <= found.quality.objective + 1e-9


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("load_weight", [0.0, 0.5])
def test_finds_the_exact_answer_for_few_experts(shape: tuple[int, int], load_weight: float) -> None:
    (experts, clusters) = shape
    for seed in range(12):
        similarity_EE, loads_E = draw_problem(seed, experts)
        exact = best_balanced(similarity_EE, clusters, loads_E, load_weight)[1]
        found = assign_balanced(similarity_EE, clusters, seed=seed, restarts=16, loads=loads_E, load_weight=load_weight)
        assert found.quality.objective == pytest.approx(exact, abs=1e-9)


@given(seed=seeds, shape=st.sampled_from(SMALL), load_weight=st.sampled_from([0.0, 0.5]))
@settings(max_examples=40)
def test_even_one_start_is_between_the_mean_of_all_clusterings_and_the_best(
    seed: int, shape: tuple[int, int], load_weight: float
) -> None:
    (experts, clusters), (similarity_EE, loads_E) = shape, draw_problem(seed, shape[0])
    all_values = [
        cluster_quality(
            similarity_EE, [next(c for c, g in enumerate(gs) if e in g) for e in range(experts)], loads_E, load_weight
        ).objective
        for gs in balanced_clusterings(tuple(range(experts)), experts // clusters)
    ]
    found = assign_balanced(similarity_EE, clusters, seed=seed, restarts=1, loads=loads_E, load_weight=load_weight)
    assert np.mean(all_values) - 1e-9 <= found.quality.objective <= max(all_values) + 1e-9


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize(("experts", "clusters"), [(24, 4), (64, 8)])
def test_beats_random_clusterings(experts: int, clusters: int, planted: bool) -> None:
    rng = np.random.default_rng(9)
    structure_E = planted_groups(0, experts, clusters if planted else experts)
    similarity_EE = planted_similarity(1, structure_E)
    found = assign_balanced(similarity_EE, clusters, seed=0)
    for _ in range(200):
        drawn = cluster_quality(similarity_EE, random_labels(rng, experts, clusters))
        assert drawn.objective < found.quality.objective


@pytest.mark.parametrize(("experts", "clusters"), [(32, 4), (64, 8), (128, 16)])
def test_planted_groups_are_found_where_greed_fails(experts: int, clusters: int) -> None:
    better = 0
    for seed in range(6):
        truth_E = planted_groups(seed, experts, clusters)
        similarity_EE = planted_similarity(seed, truth_E)
        found = assign_balanced(similarity_EE, clusters, seed=seed)
        assert adjusted_rand_index(truth_E, found.labels) > 0.95
        greedy = cluster_quality(similarity_EE, greedy_labels(similarity_EE, clusters))
        assert found.quality.objective >= greedy.objective - 1e-9
        better += found.quality.objective > greedy.objective + 0.01
    assert better >= 5  # greed wins its way only where the first experts happen to be of different groups


def test_many_experts() -> None:
    truth_E = planted_groups(0, 256, 16)
    found = assign_balanced(planted_similarity(0, truth_E, width=64), 16, seed=0, restarts=2)
    assert adjusted_rand_index(truth_E, found.labels) > 0.95


def test_equal_arguments_give_equal_answers() -> None:
    similarity_EE, loads_E = draw_problem(3, 24)

    def groups(seed: int) -> tuple[tuple[int, ...], ...]:
        return assign_balanced(similarity_EE, 4, seed=seed, restarts=1, loads=loads_E, load_weight=0.3).groups

    assert groups(5) == groups(5)
    assert len({groups(seed) for seed in range(8)}) > 1


@given(order=st.permutations(range(24)))
@settings(max_examples=20)
def test_a_clear_answer_follows_the_experts_order(order: list[int]) -> None:
    similarity_EE = planted_similarity(0, planted_groups(0, 24, 4), noise=0.5)
    labels_E = np.array(assign_balanced(similarity_EE, 4, seed=0).labels)
    reordered = assign_balanced(similarity_EE[np.ix_(order, order)], 4, seed=0)
    assert adjusted_rand_index(labels_E[order], reordered.labels) == 1


@given(scale=st.sampled_from([2.0**-20, 0.5, 1024.0]), shift=st.sampled_from([-4.0, 0.0, 4.0]))
def test_scale_and_offset_of_the_similarity_do_not_matter(scale: float, shift: float) -> None:
    """Also for seeding: counts of common choices have other scales than cosines."""
    similarity_EE = planted_similarity(0, planted_groups(0, 24, 4))
    found = assign_balanced(scale * similarity_EE + shift, 4, seed=0, restarts=1)
    assert found.groups == assign_balanced(similarity_EE, 4, seed=0, restarts=1).groups


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_experts_that_are_all_alike_are_left_where_they_are(value: float) -> None:
    start_E = random_labels(np.random.default_rng(0), 12, 3)
    found = assign_balanced(np.full((12, 12), value), 3, seed=0, start=start_E)
    assert found.labels == tuple(start_E.tolist())


def test_a_warm_start_keeps_what_is_best_already_and_improves_what_is_not() -> None:
    similarity_EE, _ = draw_problem(0, 24)
    best = assign_balanced(similarity_EE, 4, seed=0, restarts=30)
    renamed_E = (np.array(best.labels) + 1) % 4
    assert assign_balanced(similarity_EE, 4, seed=1, restarts=1, start=renamed_E).labels == tuple(renamed_E.tolist())
    spoilt_E = renamed_E.copy()
    i, j = np.flatnonzero(renamed_E == 0)[0], np.flatnonzero(renamed_E == 1)[0]
    spoilt_E[[i, j]] = renamed_E[[j, i]]
    warm = assign_balanced(similarity_EE, 4, seed=0, restarts=0, start=spoilt_E)
    assert warm.quality.objective > cluster_quality(similarity_EE, spoilt_E).objective


def test_a_price_on_imbalance_evens_the_loads() -> None:
    """Two planted groups, one of which gets all the work."""
    truth_E = planted_groups(0, 16, 2)
    similarity_EE = planted_similarity(0, truth_E)
    loads_E = np.where(truth_E == 0, 9.0, 1.0)
    found = [assign_balanced(similarity_EE, 2, seed=0, loads=loads_E, load_weight=w).quality for w in (0, 0.3, 1, 10)]
    assert found[0].imbalance == pytest.approx(0.64)
    assert found[-1].imbalance == pytest.approx(0)
    for cheap, dear in pairwise(found):
        assert dear.imbalance <= cheap.imbalance + 1e-9
        assert dear.similarity <= cheap.similarity + 1e-9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    similarity_EE, loads_E = draw_problem(0, 8)
    bad_EE = similarity_EE.copy()
    bad_EE[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        assign_balanced(bad_EE, 2, seed=0)
    loads_E[1] = value
    with pytest.raises(ValueError, match="loads must be 8 finite"):
        assign_balanced(similarity_EE, 2, seed=0, loads=loads_E, load_weight=1.0)


def test_what_does_not_fit_is_refused() -> None:
    similarity_EE, _ = draw_problem(0, 8)
    with pytest.raises(ValueError, match="8 experts cannot be divided into 3"):
        assign_balanced(similarity_EE, 3, seed=0)
    with pytest.raises(ValueError, match=r"must be \[E, E\]"):
        assign_balanced(similarity_EE[:4], 2, seed=0)
    with pytest.raises(ValueError, match="leaves no start"):
        assign_balanced(similarity_EE, 2, seed=0, restarts=0)
    for start in ([0, 0, 0, 0, 0, 1, 1, 1], [0] * 4 + [2] * 4, [0, 1]):
        with pytest.raises(ValueError, match="2 equal clusters"):
            assign_balanced(similarity_EE, 2, seed=0, start=start)
