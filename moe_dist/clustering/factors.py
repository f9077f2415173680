"""Factored projections: experts as a shared base of their cluster and a low-rank residual.

Shapes: C bases (clusters), E experts, I rows of a projection, O its columns, R rank; D model width, F hidden width, H =
2 F (gate | up).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FactoredProjection:
    """One projection of every expert: `W_e = bases[base_of[e]] + u[e] v[e]`, never materialized."""

    bases_CIO: Tensor
    base_of_E: Tensor  # int64: the base of each expert
    u_EIR: Tensor
    v_ERO: Tensor

    def __post_init__(self) -> None:
        (bases, rows, columns), (experts, u_rows, rank) = self.bases_CIO.shape, self.u_EIR.shape
        if u_rows != rows or self.v_ERO.shape != (experts, rank, columns) or self.base_of_E.shape != (experts,):
            shapes = [tuple(t.shape) for t in (self.bases_CIO, self.base_of_E, self.u_EIR, self.v_ERO)]
            raise ValueError(f"a projection takes [C, I, O], [E], [E, I, R] and [E, R, O], not {shapes}")
        if experts and not 0 <= int(self.base_of_E.min()) <= int(self.base_of_E.max()) < bases:
            raise ValueError(f"base_of_E must be in 0 to {bases - 1}, got {self.base_of_E.unique().tolist()}")


def gated_projections(
    base_in_CDH: Tensor,
    base_out_CFD: Tensor,
    base_of_E: Tensor,
    in_u_EDR: Tensor,
    in_v_ERH: Tensor,
    out_u_EFR: Tensor,
    out_v_ERD: Tensor,
) -> tuple[FactoredProjection, ...]:
    """Return gate, up and output projection of gated experts, as views of the experts' tensors.

    Args:
        base_in_CDH: gate | up of each base, [C, D, 2F].
        base_out_CFD: output of each base, [C, F, D].
        base_of_E: index of an expert's base, [E].
        in_u_EDR: U of gate | U of up, [E, D, 2R].
        in_v_ERH: V of gate, V of up, [E, 2, R, F].
        out_u_EFR: [E, F, R].
        out_v_ERD: [E, R, D].
    """
    gate_base_CDF, up_base_CDF = base_in_CDH.chunk(2, dim=2)
    gate_u_EDR, up_u_EDR = in_u_EDR.chunk(2, dim=2)
    return (
        FactoredProjection(gate_base_CDF, base_of_E, gate_u_EDR, in_v_ERH[:, 0]),
        FactoredProjection(up_base_CDF, base_of_E, up_u_EDR, in_v_ERH[:, 1]),
        FactoredProjection(base_out_CFD, base_of_E, out_u_EFR, out_v_ERD),
    )
