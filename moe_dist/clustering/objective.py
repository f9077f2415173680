"""Objective of a clustering as weights of pairs.

For balanced clusters of n = E/G experts both parts of the objective are sums over ordered pairs i != j of one cluster:

    similarity = sum S_ij / (G n (n - 1)),    imbalance = sum l_i l_j / (G m^2) + constant,   m = mean cluster load,

so equal load is a repulsion between heavy experts, and the optimizers handle pair weights alone. Since swaps on a sum
over pairs are an elementary landscape (Grover 1992), a clustering that no swap improves is never below the mean over
all balanced clusterings, whatever the similarity.

Shapes: E experts, G clusters.
"""

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def pair_weights(
    similarity: npt.ArrayLike, clusters: int, loads: npt.ArrayLike | None = None, load_weight: float = 0.0
) -> Matrix:
    """Compute A [E, E], symmetric, zero diagonal: objective = sum of A_ij over pairs of one cluster + constant.

    Raises:
        ValueError: S is not square or not finite, E does not divide, or loads are not E finite non-negative numbers.
    """
    similarity_EE: Matrix = np.asarray(similarity, dtype=np.float64)
    experts = len(similarity_EE)
    if similarity_EE.shape != (experts, experts) or not experts:
        raise ValueError(f"similarity must be [E, E], is {similarity_EE.shape}")
    if not np.isfinite(similarity_EE).all():
        raise ValueError("similarity holds values that are not finite: experts cannot be clustered by it")
    if clusters < 1 or experts % clusters:
        raise ValueError(f"{experts} experts cannot be divided into {clusters} equal clusters")
    size = experts // clusters
    weights_EE: Matrix = (similarity_EE + similarity_EE.T) / (2 * clusters * size * max(size - 1, 1))
    if loads is not None and load_weight:
        share_E = _cluster_shares(loads, experts, clusters)
        weights_EE -= load_weight / clusters * np.outer(share_E, share_E)
    np.fill_diagonal(weights_EE, 0.0)
    return weights_EE


def affinities(weights_EE: Matrix, labels_E: Labels, clusters: int) -> Matrix:
    """Sum A_ij over the members j of each cluster, [E, G]."""
    return weights_EE @ np.eye(clusters)[labels_E]


def pair_sum(affinity_EG: Matrix, labels_E: Labels) -> float:
    """Sum A_ij over ordered pairs of one cluster."""
    return float(affinity_EG[np.arange(len(labels_E)), labels_E].sum())


def _cluster_shares(loads: npt.ArrayLike, experts: int, clusters: int) -> Matrix:
    """Return loads in units of the mean cluster load; zero if no tokens were routed."""
    loads_E: Matrix = np.asarray(loads, dtype=np.float64)
    if loads_E.shape != (experts,) or not np.isfinite(loads_E).all() or (loads_E < 0).any():
        raise ValueError(f"loads must be {experts} finite numbers, not negative")
    total = loads_E.sum()
    return loads_E * (clusters / total) if total > 0 else loads_E
