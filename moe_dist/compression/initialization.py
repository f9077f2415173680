"""Initialization of bases and of experts' residuals.

Each function takes its own generator, so that a cluster or an expert starts the same on any rank. The recipe was
measured on small models: U with std fan_in^-1/2 and V with a small std make the residual start near zero but with
gradients on both factors; vectors start at zero, where they change nothing.

Shapes: D model width, F hidden width, H = 2 F (gate | up), R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

V_STD = 0.02


@dataclass(frozen=True)
class ExpertResidual:
    """Tensors of one expert: one entry of each per-expert tensor of `ClusterWeights`."""

    in_u_DR: Tensor  # [d, 2r]
    in_v_RH: Tensor  # [2, r, f]
    out_u_FR: Tensor  # [f, r]
    out_v_RD: Tensor  # [r, d]
    hidden_gate_F: Tensor | None  # [f]; None without vectors, like the two below
    hidden_bias_H: Tensor | None  # [2f]
    output_bias_D: Tensor | None  # [d]

    def float(self) -> "ExpertResidual":
        """Convert to float32."""
        return self._each(lambda value: value.float())

    def zeros(self) -> "ExpertResidual":
        """Return zeros of the same shapes."""
        return self._each(torch.zeros_like)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "ExpertResidual":
        values = {name: None if value is None else change(value) for name, value in vars(self).items()}
        return ExpertResidual(**values)  # type: ignore[arg-type]


def init_base(
    hidden: int, expert_hidden: int, in_std: float, out_std: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Initialize a cluster's base, normal: [d, 2f] with std `in_std` and [f, d] with std `out_std`, float32."""
    base_in_DH = torch.randn(hidden, 2 * expert_hidden, generator=generator) * in_std
    return base_in_DH, torch.randn(expert_hidden, hidden, generator=generator) * out_std


def init_residual(
    hidden: int, expert_hidden: int, rank: int, vectors: bool, generator: torch.Generator
) -> ExpertResidual:
    """Initialize an expert's factors (U: std fan_in^-1/2, V: std 0.02) and optional vectors (zero), float32."""
    return ExpertResidual(
        in_u_DR=torch.randn(hidden, 2 * rank, generator=generator) * hidden**-0.5,
        in_v_RH=torch.randn(2, rank, expert_hidden, generator=generator) * V_STD,
        out_u_FR=torch.randn(expert_hidden, rank, generator=generator) * expert_hidden**-0.5,
        out_v_RD=torch.randn(rank, hidden, generator=generator) * V_STD,
        hidden_gate_F=torch.zeros(expert_hidden) if vectors else None,
        hidden_bias_H=torch.zeros(2 * expert_hidden) if vectors else None,
        output_bias_D=torch.zeros(hidden) if vectors else None,
    )
