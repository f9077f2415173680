"""Experts and similarities to cluster, and their weights written out.

Shapes: C bases, E experts, I rows of a projection, O its columns, R rank, S all entries of an expert's weights.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_dist.clustering import FactoredProjection

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def draw_projections(
    seed: int, shapes: list[tuple[int, int]], bases: int, experts: int, rank: int
) -> list[FactoredProjection]:
    """Projections of the given [I, O] with normal entries, residuals about as large as bases."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    base_of_E = torch.randint(bases, (experts,), generator=g)
    return [
        FactoredProjection(normal(bases, i, o), base_of_E, normal(experts, i, rank), normal(experts, rank, o))
        for i, o in shapes
    ]


def materialised(projections: list[FactoredProjection]) -> Tensor:
    """All effective weights of each expert in a row, [E, S]."""
    return torch.cat([(p.bases_CIO[p.base_of_E] + p.u_EIR @ p.v_ERO).flatten(1) for p in projections], dim=1)


def cosines(x_ES: Tensor) -> Tensor:
    """Cosines of the rows less their mean, [E, E]."""
    centered_ES = x_ES - x_ES.mean(0)
    unit_ES: Tensor = centered_ES / centered_ES.norm(dim=1, keepdim=True)
    return unit_ES @ unit_ES.T


def planted_groups(seed: int, experts: int, groups: int) -> Labels:
    return np.random.default_rng(seed).permutation(np.arange(experts) % groups)


def planted_vectors(seed: int, labels_E: Labels, width: int, noise: float) -> Matrix:
    """A unit-variance centre for each group plus noise, [E, width]."""
    rng = np.random.default_rng(seed)
    centre_GS = rng.normal(size=(labels_E.max() + 1, width))
    return centre_GS[labels_E] + noise * rng.normal(size=(len(labels_E), width))


def planted_similarity(seed: int, labels_E: Labels, width: int = 32, noise: float = 1.0) -> Matrix:
    return np.asarray(cosines(torch.from_numpy(planted_vectors(seed, labels_E, width, noise))))
