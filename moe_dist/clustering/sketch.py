"""Random sketches of effective weights, which ranks compute of their own experts and gather.

The sketch of a projection W [I, O] is `P^T W Q` with the same random P, Q for every expert, so that `E <P^T W Q, P^T W'
Q> = <W, W'>` (Johnson-Lindenstrauss, two-sided). P and Q have orthonormal columns times sqrt(I / s) and sqrt(O / s):
the error shrinks as about 1/s and vanishes where s reaches both widths.

Every rank with the same seed computes the same sketch, so an expert's sketch depends on its weights alone.

Shapes: E experts, I rows of a projection, O its columns, S entries of all sketches of an expert, R rank, C bases.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from moe_dist.clustering.cosine import cosine_of_vectors
from moe_dist.clustering.factors import FactoredProjection

SKETCH_SIZE = 64
"""Rows and columns of a sketch: 64 gave the clusters of exact Gram matrices on small models, 8 did not."""


def sketch_weights(
    projections: Sequence[FactoredProjection],
    seed: int,
    size: int = SKETCH_SIZE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the sketches of any experts at hand; no communication.

    Args:
        projections: projections of the experts, in the same order on every rank.
        seed: the same on all ranks; it may change from round to round.
        size: rows and columns of a sketch, at most; a narrower side is kept whole.
        dtype: type of the result. In a 16-bit type the experts' common part would hide their differences.

    Returns:
        [E, S], one row per expert with the sketches of all projections: 3 x 64 x 64 float32 are 48 KiB.
    """
    if size < 1:
        raise ValueError(f"a sketch needs at least 1 row and column, not {size}")
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([_sketch_projection(p, size, generator).flatten(1) for p in projections], dim=1).to(dtype)


def sketched_parameter_similarity(sketch_ES: Tensor) -> Tensor:
    """Estimate S_param from the sketches of all experts, in the order of their rows: float64 [E, E]."""
    return cosine_of_vectors(sketch_ES)


def _sketch_projection(p: FactoredProjection, size: int, generator: torch.Generator) -> Tensor:
    """Compute P^T B Q + (P^T U) (V Q) for every expert, float64 [E, size, size]."""
    rows, columns = p.bases_CIO.shape[1:]
    left = _orthonormal(rows, size, generator).to(p.u_EIR.device)
    right = _orthonormal(columns, size, generator).to(p.u_EIR.device)
    bases = torch.stack([left.T @ base_IO.double() @ right for base_IO in p.bases_CIO])
    return bases[p.base_of_E] + (left.T @ p.u_EIR.double()) @ (p.v_ERO.double() @ right)


def _orthonormal(width: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw orthonormal columns times sqrt(width / size), float64 [width, size]; the identity's span if size allows."""
    if size >= width:
        return torch.eye(width, dtype=torch.float64)
    drawn = torch.randn(width, size, generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q
    return orthonormal * sqrt(width / size)
