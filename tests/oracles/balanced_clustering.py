"""The best balanced clustering by trying all of them: slow, for tests of the fast one."""

from collections.abc import Iterator
from itertools import combinations
from math import factorial

import numpy as np
import numpy.typing as npt

from moe_dist.clustering.quality import cluster_quality

MOST = 100_000
"""Clusterings that are tried at most."""

Groups = tuple[tuple[int, ...], ...]


def best_balanced(
    similarity: npt.ArrayLike, clusters: int, loads: npt.ArrayLike | None = None, load_weight: float = 0.0
) -> tuple[Groups, float]:
    """Groups with the largest objective (`cluster_quality`), and that objective.

    Raises:
        ValueError: E does not divide, or there are more clusterings than anyone would wait for.
    """
    similarity_EE = np.asarray(similarity, dtype=np.float64)
    experts = len(similarity_EE)
    count = number_of_clusterings(experts, clusters)
    if count > MOST:
        raise ValueError(f"{experts} experts have {count} clusterings into {clusters}; at most {MOST} are tried")

    def objective(groups: Groups) -> float:
        labels = [next(c for c, group in enumerate(groups) if e in group) for e in range(experts)]
        return cluster_quality(similarity_EE, labels, loads, load_weight).objective

    best = max(balanced_clusterings(tuple(range(experts)), experts // clusters), key=objective)
    return best, objective(best)


def number_of_clusterings(experts: int, clusters: int) -> int:
    """E! / ((E/G)!^G G!): balanced clusterings that differ by more than names."""
    if clusters < 1 or experts % clusters:
        raise ValueError(f"{experts} experts cannot be divided into {clusters} equal clusters")
    same: int = factorial(experts // clusters) ** clusters * factorial(clusters)
    return factorial(experts) // same


def balanced_clusterings(experts: tuple[int, ...], size: int) -> Iterator[Groups]:
    """Every division of the experts into groups of `size`, each once; a group is led by its smallest expert."""
    if not experts:
        yield ()
        return
    first, *rest = experts
    for others in combinations(rest, size - 1):
        group = (first, *others)
        for remaining in balanced_clusterings(tuple(e for e in rest if e not in others), size):
            yield (group, *remaining)
