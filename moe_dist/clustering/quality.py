"""Quality of a clustering: its objective, computed directly, and its agreement with another clustering.

Shapes: E experts, G clusters.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClusterQuality:
    """Objective of a clustering and its parts.

    Attributes:
        similarity: mean of S_ij over ordered pairs i != j of one cluster; 0 where clusters hold one expert.
        imbalance: mean_c((L_c / mean L)^2) - 1 of the clusters' loads L (squared coefficient of variation); 0 is even.
        objective: similarity - load_weight * imbalance.
    """

    similarity: float
    imbalance: float
    objective: float


def cluster_quality(
    similarity: npt.ArrayLike,
    labels: npt.ArrayLike,
    loads: npt.ArrayLike | None = None,
    load_weight: float = 0.0,
) -> ClusterQuality:
    """Evaluate a clustering of any cluster sizes.

    Args:
        similarity: S [E, E].
        labels: cluster of each expert, 0 to G - 1, [E].
        loads: work of each expert, not negative, [E]; None: equal.
        load_weight: price of imbalance.
    """
    similarity_EE, labels_E = np.asarray(similarity, dtype=np.float64), np.asarray(labels)
    together_EE = labels_E[:, None] == labels_E[None, :]
    np.fill_diagonal(together_EE, False)
    within = float(similarity_EE[together_EE].mean()) if together_EE.any() else 0.0
    loads_E = np.ones(len(labels_E)) if loads is None else np.asarray(loads, dtype=np.float64)
    loads_G = np.bincount(labels_E, weights=loads_E)
    imbalance = float(np.mean((loads_G / loads_G.mean()) ** 2) - 1) if loads_G.any() else 0.0
    return ClusterQuality(within, imbalance, within - load_weight * imbalance)


def adjusted_rand_index(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Compute the agreement of two clusterings of the same items: 1 if equal but for names, 0 on average by chance.

    Formula: (sum_ab C(n_ab, 2) - e) / ((sum_a C(n_a, 2) + sum_b C(n_b, 2)) / 2 - e) with
    e = sum_a C(n_a, 2) sum_b C(n_b, 2) / C(n, 2) (Hubert and Arabie 1985). Two clusterings in which it is 0 / 0 (both
    one cluster, or both single items) are equal: 1.

    Raises:
        ValueError: the clusterings do not cover the same number of items.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"clusterings must label the same items, label {a.shape} and {b.shape}")
    (_, a), (_, b) = np.unique(a, return_inverse=True), np.unique(b, return_inverse=True)
    table = np.zeros((a.max(initial=0) + 1, b.max(initial=0) + 1))
    np.add.at(table, (a, b), 1)
    together, pairs_a, pairs_b = (_pairs(counts) for counts in (table, table.sum(1), table.sum(0)))
    everything = len(a) * (len(a) - 1) / 2
    expected = pairs_a * pairs_b / everything if everything else 0.0
    most = (pairs_a + pairs_b) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _pairs(counts: npt.NDArray[np.float64]) -> float:
    return float((counts * (counts - 1)).sum() / 2)
