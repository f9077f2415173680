"""What Adam knew of a full expert, carried over to the base and the factors that take its place.

With `W = B + U V` and gradient G of W, the chain rule gives the base the sum of its members' gradients, U `G V^T` and V
`U^T G`. First moments are linear in the gradients and follow exactly; second moments follow as if the entries of G, and
the gradients of different members, were independent of each other.

Shapes: I rows of a projection, O its columns, R rank.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_dist.compression.expert_matrices import ExpertMatrices
from moe_dist.compression.initialisation import ExpertResidual


def project_first(moment: ExpertMatrices, residual: ExpertResidual) -> ExpertResidual:
    """First moments of the factors: `M V^T` and `U^T M`; zero for vectors."""
    return _project(moment, residual, lambda factor: factor)


def project_second(moment: ExpertMatrices, residual: ExpertResidual) -> ExpertResidual:
    """Second moments of the factors: the same with squared factors; zero for vectors."""
    return _project(moment, residual, torch.square)


def _project(moment: ExpertMatrices, residual: ExpertResidual, weigh: Callable[[Tensor], Tensor]) -> ExpertResidual:
    gate_DF, up_DF, out_FD = moment.projections()
    u_gate, u_up = residual.in_u_DR.chunk(2, dim=1)
    v_gate, v_up = residual.in_v_RH
    gate, up, out = (
        (m_IO @ weigh(v_RO).T, weigh(u_IR).T @ m_IO)
        for m_IO, u_IR, v_RO in (
            (gate_DF, u_gate, v_gate),
            (up_DF, u_up, v_up),
            (out_FD, residual.out_u_FR, residual.out_v_RD),
        )
    )

    return replace(
        residual.zeros(),
        in_u_DR=torch.cat([gate[0], up[0]], dim=1),
        in_v_RH=torch.stack([gate[1], up[1]]),
        out_u_FR=out[0],
        out_v_RD=out[1],
    )
