"""Full gated expert: of a standard layer, or the equivalent of a base with a residual.

Shapes: T tokens, D model width, F hidden width, H = 2 F (gate | up), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.compression.initialization import ExpertResidual


@dataclass(frozen=True)
class ExpertMatrices:
    """Full expert: `h = silu(x W_gate) * (x W_up)`, `y = h W_out`."""

    w_in_DH: Tensor  # [d, 2f]: gate | up
    w_out_FD: Tensor  # [f, d]

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate [d, f], up [d, f] and output [f, d]."""
        gate_DF, up_DF = self.w_in_DH.chunk(2, dim=1)
        return gate_DF, up_DF, self.w_out_FD

    def double(self) -> "ExpertMatrices":
        """Convert to float64."""
        return ExpertMatrices(self.w_in_DH.double(), self.w_out_FD.double())

    def float(self) -> "ExpertMatrices":
        """Convert to float32."""
        return ExpertMatrices(self.w_in_DH.float(), self.w_out_FD.float())

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Compute the hidden units of some tokens, [T, F]."""
        gate_TF, up_TF = (x_TD @ self.w_in_DH).chunk(2, dim=1)
        return functional.silu(gate_TF) * up_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Compute the outputs of some tokens, [T, D]."""
        return self.hidden(x_TD) @ self.w_out_FD

    def with_factors(self, in_p_DR: Tensor, in_q_RH: Tensor, out_p_FR: Tensor, out_q_RD: Tensor) -> "ExpertMatrices":
        """Return these weights plus a cluster's factors, as a two-level base."""
        return ExpertMatrices(
            torch.addmm(self.w_in_DH, in_p_DR, in_q_RH), torch.addmm(self.w_out_FD, out_p_FR, out_q_RD)
        )

    def with_residual(self, residual: ExpertResidual) -> "ExpertMatrices":
        """Return this base plus the residual's products, without its vectors."""
        u_gate_DR, u_up_DR = residual.in_u_DR.chunk(2, dim=1)
        v_gate_RF, v_up_RF = residual.in_v_RH
        change_DH = torch.cat([u_gate_DR @ v_gate_RF, u_up_DR @ v_up_RF], dim=1)
        return ExpertMatrices(self.w_in_DH + change_DH, self.w_out_FD + residual.out_u_FR @ residual.out_v_RD)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return `|found - exact| / |exact|` over all entries; 0 if both are empty or zero."""
    part, whole = (torch.linalg.vector_norm(value).item() for value in (found - exact, exact))
    return part / whole if whole > 0 else float(part > 0)
