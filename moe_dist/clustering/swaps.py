"""Swap refinement: pairs of experts exchange clusters while that improves the objective.

Shapes: E experts, G clusters.
"""

import numpy as np

from moe_dist.clustering.objective import Labels, Matrix, affinities

ROUNDING = 1e-12
"""Gain, relative to the largest weight and the number of experts, up to which it counts as rounding."""


def refine_by_swaps(weights_EE: Matrix, labels_E: Labels, clusters: int) -> Labels:
    """Return the local optimum that best swaps reach: no exchange of two experts improves it.

    Each expert in turn exchanges clusters with the one that gains most, until a whole round gains nothing.

    Args:
        weights_EE: pair weights A, symmetric with zero diagonal.
        labels_E: balanced start; it is not changed.
    """
    labels_E, everyone = labels_E.copy(), np.arange(len(labels_E))
    least = ROUNDING * len(labels_E) * float(np.abs(weights_EE).max())
    affinity_EG = affinities(weights_EE, labels_E, clusters)
    own_E = affinity_EG[everyone, labels_E]
    turn, last_swap = 0, 0
    while turn < last_swap + len(labels_E):
        i = turn % len(labels_E)
        turn += 1
        gain_E = _gains(i, weights_EE, affinity_EG, labels_E, own_E)
        j = int(gain_E.argmax())
        if gain_E[j] > least:
            _swap(i, j, weights_EE, affinity_EG, labels_E)
            own_E = affinity_EG[everyone, labels_E]
            last_swap = turn
    return labels_E


def _gains(i: int, weights_EE: Matrix, affinity_EG: Matrix, labels_E: Labels, own_E: Matrix) -> Matrix:
    """Return half of the gain of exchanging i with each other expert, [E]; -inf within i's cluster.

    For i in a and j in b: M_ib - M_ia + M_ja - M_jb - 2 A_ij, where M are the affinities. Computed in place, since it
    takes most of the time of clustering.
    """
    a = labels_E[i]
    gain_E: Matrix = weights_EE[i] * -2
    gain_E += affinity_EG[i].take(labels_E)
    gain_E += affinity_EG[:, a]
    gain_E -= own_E
    gain_E -= own_E[i]
    gain_E[labels_E == a] = -np.inf
    return gain_E


def _swap(i: int, j: int, weights_EE: Matrix, affinity_EG: Matrix, labels_E: Labels) -> None:
    """Exchange i and j, and update the affinities."""
    a, b, change_E = labels_E[i], labels_E[j], weights_EE[j] - weights_EE[i]
    affinity_EG[:, a] += change_E
    affinity_EG[:, b] -= change_E
    labels_E[i], labels_E[j] = b, a
