"""Balanced assignment of E experts to G clusters of exactly E/G, by similarity and load.

Each start is drawn as in spherical k-means++. Experts are then reassigned by their mean similarity to each cluster
(Hungarian method on replicated slots) while the objective grows, and swaps reach a local optimum of the whole
objective, loads included; the best start wins. A given clustering is improved by swaps alone, so that few experts move.

Only the matrix is read, so any pairwise similarity works, co-activation as well.

Shapes: E experts, G clusters, N = E/G slots of a cluster.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_dist.clustering.objective import Labels, Matrix, affinities, pair_sum, pair_weights
from moe_dist.clustering.quality import ClusterQuality, cluster_quality
from moe_dist.clustering.swaps import ROUNDING, refine_by_swaps

RESTARTS = 8
REASSIGNMENTS = 4
"""Limit of reassignment rounds: the first gain most, and swaps gain the rest in less time."""


@dataclass(frozen=True)
class Assignment:
    """Balanced clustering: `groups[c]` are the experts of cluster c, ascending."""

    groups: tuple[tuple[int, ...], ...]
    quality: ClusterQuality

    @property
    def labels(self) -> tuple[int, ...]:
        """Cluster of each expert."""
        cluster_of = {expert: cluster for cluster, group in enumerate(self.groups) for expert in group}
        return tuple(cluster_of[expert] for expert in range(len(cluster_of)))


def assign_balanced(
    similarity: npt.ArrayLike,
    clusters: int,
    *,
    seed: int,
    restarts: int = RESTARTS,
    start: npt.ArrayLike | None = None,
    loads: npt.ArrayLike | None = None,
    load_weight: float = 0.0,
) -> Assignment:
    """Maximize mean within-cluster similarity - load_weight * imbalance of the clusters' loads.

    Args:
        similarity: S [E, E]; made symmetric, its diagonal is not read.
        clusters: G, a divisor of E.
        seed: seed of the starts; equal arguments give equal results.
        restarts: number of random starts.
        start: additional start (the present clustering), [E]; kept unless another is better beyond rounding.
        loads: work of each expert, [E]; None: equal.
        load_weight: price of imbalance (`ClusterQuality.imbalance`).

    Raises:
        ValueError: invalid shapes, values that are not finite, an unbalanced start, or no start.
    """
    alike_EE = pair_weights(similarity, clusters)
    weights_EE = pair_weights(similarity, clusters, loads, load_weight)
    if restarts < (start is None):
        raise ValueError(f"restarts={restarts} without a start leaves no start")
    best_E: Labels | None = None
    best = -np.inf
    for labels_E in _starts(alike_EE, clusters, seed, restarts, start):
        found_E = refine_by_swaps(weights_EE, labels_E, clusters)
        value = pair_sum(affinities(weights_EE, found_E, clusters), found_E)
        if best_E is None or value > best + ROUNDING * abs(best):
            best_E, best = found_E, value
    assert best_E is not None
    groups = tuple(tuple(np.flatnonzero(best_E == c).tolist()) for c in range(clusters))
    return Assignment(groups, cluster_quality(similarity, best_E, loads, load_weight))


def balanced_argmax(score_EG: Matrix) -> Labels:
    """Return the balanced labels with the largest sum of scores (Hungarian method on N replicas of each cluster)."""
    from scipy.optimize import linear_sum_assignment  # here, so that layers need no scipy

    slots = score_EG.shape[0] // score_EG.shape[1]
    _, column_E = linear_sum_assignment(np.repeat(score_EG, slots, axis=1), maximize=True)
    labels_E: Labels = column_E // slots
    return labels_E


def _starts(
    weights_EE: Matrix, clusters: int, seed: int, restarts: int, start: npt.ArrayLike | None
) -> Iterator[Labels]:
    if start is not None:
        yield _checked_start(start, len(weights_EE), clusters)
    for stream in np.random.SeedSequence(seed).spawn(restarts):
        drawn_E = _draw_start(weights_EE, clusters, np.random.default_rng(stream))
        yield _reassign(weights_EE, drawn_E, clusters)


def _checked_start(start: npt.ArrayLike, experts: int, clusters: int) -> Labels:
    labels_E: Labels = np.asarray(start, dtype=np.int64)
    if labels_E.ndim != 1 or sorted(labels_E.tolist()) != sorted([*range(clusters)] * (experts // clusters)):
        raise ValueError(f"a start must put {experts} experts into {clusters} equal clusters")
    return labels_E


def _draw_start(weights_EE: Matrix, clusters: int, rng: np.random.Generator) -> Labels:
    """Draw a start by k-means++: further centers are drawn in proportion to their distance from the present ones.

    On the unit sphere the squared distance is 2 (1 - cosine); here it is counted from the largest weight, so that any
    matrix works, whatever its scale.
    """
    others_EE = ~np.eye(len(weights_EE), dtype=bool)
    near_EE = np.where(others_EE, weights_EE, weights_EE.max(where=others_EE, initial=weights_EE.min()))
    centers = [int(rng.integers(len(weights_EE)))]
    while len(centers) < clusters:
        far_E = near_EE.max() - near_EE[:, centers].max(axis=1)
        far_E[centers] = 0.0
        if not far_E.sum() > 0:  # all equal: draw any
            far_E = np.ones(len(weights_EE))
            far_E[centers] = 0.0
        centers.append(int(rng.choice(len(far_E), p=far_E / far_E.sum())))
    return balanced_argmax(near_EE[:, centers])


def _reassign(weights_EE: Matrix, labels_E: Labels, clusters: int) -> Labels:
    """Reassign all experts by their mean weight to each cluster, themselves excluded, while the objective grows."""
    everyone, others = np.arange(len(labels_E)), len(labels_E) // clusters
    affinity_EG = affinities(weights_EE, labels_E, clusters)
    for _ in range(REASSIGNMENTS):
        value = pair_sum(affinity_EG, labels_E)
        mean_EG = affinity_EG / others
        mean_EG[everyone, labels_E] *= others / max(others - 1, 1)
        moved_E = balanced_argmax(mean_EG)
        affinity_EG = affinities(weights_EE, moved_E, clusters)
        if not pair_sum(affinity_EG, moved_E) > value + ROUNDING * abs(value):
            break
        labels_E = moved_E
    return labels_E
