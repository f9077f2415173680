"""Alignment of hidden units, before experts are averaged.

A gated expert computes the same function under any permutation of its hidden units, and under a change of sign of a
unit's up column and output row together. Independent experts may have similar units in different positions, where their
mean cancels. Each expert is matched to a reference by the Hungarian method (as Ainsworth et al. 2023 do for whole
networks), which brings it as near to the reference as these symmetries can.

Shapes: D model width, F hidden width, H = 2 F (gate | up).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.compression.expert_matrices import ExpertMatrices


@dataclass(frozen=True)
class UnitOrder:
    """Permutation and signs: new unit f is old unit `order[f]`, its up column and output row times `sign[f]`."""

    order_F: Tensor
    sign_F: Tensor

    def apply(self, expert: ExpertMatrices) -> ExpertMatrices:
        """Return the same function with permuted units."""
        gate_DF, up_DF, out_FD = expert.projections()
        w_in_DH = torch.cat([gate_DF[:, self.order_F], up_DF[:, self.order_F] * self.sign_F], dim=1)
        return ExpertMatrices(w_in_DH, out_FD[self.order_F] * self.sign_F[:, None])


def align_hidden_units(expert: ExpertMatrices, reference: ExpertMatrices) -> UnitOrder:
    """Find the order and signs that bring `expert` nearest to `reference`, all three matrices together."""
    from scipy.optimize import linear_sum_assignment  # here, so that layers need no scipy

    (gate, up, out), (ref_gate, ref_up, ref_out) = expert.projections(), reference.projections()
    signed_FF = ref_up.T @ up + ref_out @ out.T  # [f of the reference, f of the expert]
    alike_FF = ref_gate.T @ gate + signed_FF.abs()
    rows, columns = linear_sum_assignment(alike_FF.double().cpu().numpy(), maximize=True)
    order_F = torch.as_tensor(columns, device=gate.device)
    paired_F = signed_FF[torch.as_tensor(rows, device=gate.device), order_F]
    return UnitOrder(order_F, torch.where(paired_F < 0, -1.0, 1.0).to(gate.dtype))
