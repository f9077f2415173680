"""Exact inner products of effective weights `B + U V` by trace identities; no expert's weight is materialized.

With the trace inner product, expert i on base b and expert j on base c have

    <B_b + U_i V_i, B_c + U_j V_j> = <B_b, B_c> + <U_j^T B_b, V_j> + <U_i^T B_c, V_i> + <U_i^T U_j, V_i V_j^T>

where the last factors are r x r. Cost for one projection of E experts on C bases: I O C (C + E r) + (I + O) (E r)^2
multiply-adds, against I O (E^2 + E r) when weights are materialized.

Shapes: C bases, E experts, I rows of a projection, O its columns, R rank, N experts of one block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.clustering.cosine import cosine_of_gram
from moe_dist.clustering.factors import FactoredProjection

BLOCK = 64
"""Experts per block, which bounds the [N r, E r] products."""


def parameter_similarity(projections: Sequence[FactoredProjection]) -> Tensor:
    """Compute S_param: cosines of the experts' effective weights minus their mean, all projections as one vector.

    Returns:
        float64 [E, E], symmetric, diagonal 1; not finite where a weight is not.
    """
    return cosine_of_gram(effective_gram(projections))


def effective_gram(projections: Sequence[FactoredProjection]) -> Tensor:
    """Compute inner products of effective weights, summed over projections, float64 [E, E].

    The mean base is subtracted from every weight: double centering removes it anyway, and the small differences of
    bases with a common init are not lost to rounding.
    """
    return torch.stack([_projection_gram(p) for p in projections]).sum(0)


def _projection_gram(p: FactoredProjection) -> Tensor:
    u_EIR, v_ERO = p.u_EIR.double(), p.v_ERO.double()
    bases_CIO = p.bases_CIO.double()
    bases_CIO = bases_CIO - bases_CIO.mean(0)
    base_gram_CC = bases_CIO.flatten(1) @ bases_CIO.flatten(1).T
    cross_EC = _residuals_with_bases(bases_CIO, u_EIR, v_ERO)
    gram_EE = base_gram_CC[p.base_of_E][:, p.base_of_E]
    cross_EE = cross_EC[:, p.base_of_E]
    return gram_EE + cross_EE + cross_EE.T + _residuals_with_residuals(u_EIR, v_ERO)


def _residuals_with_bases(bases_CIO: Tensor, u_EIR: Tensor, v_ERO: Tensor) -> Tensor:
    """Compute <U_e V_e, B_c> = <V_e, U_e^T B_c> [E, C]."""
    experts, rows, rank = u_EIR.shape
    u_stacked = u_EIR.transpose(1, 2).reshape(experts * rank, rows)
    return torch.stack([((u_stacked @ base_IO).view_as(v_ERO) * v_ERO).sum((1, 2)) for base_IO in bases_CIO], dim=1)


def _residuals_with_residuals(u_EIR: Tensor, v_ERO: Tensor) -> Tensor:
    """Compute <U_i V_i, U_j V_j> = <U_i^T U_j, V_i V_j^T> [E, E], one block of rows at a time."""
    experts, rows, rank = u_EIR.shape
    u_all, v_all = u_EIR.transpose(1, 2).reshape(experts * rank, rows), v_ERO.reshape(experts * rank, -1)
    blocks_NE = [
        ((u_block @ u_all.T) * (v_block @ v_all.T)).view(-1, rank, experts, rank).sum((1, 3))
        for u_block, v_block in zip(u_all.split(BLOCK * rank), v_all.split(BLOCK * rank), strict=True)
    ]
    return torch.cat(blocks_NE)
