"""Tensors of one cluster of experts: a shared base, and for each expert a low-rank residual and optional vectors.

Shapes: N experts of the cluster, D model width, F hidden width, H = 2 F (gate | up), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterWeights:
    """Weights of every product with dimension d, before and after the hidden step."""

    base_in_DH: Tensor
    base_out_FD: Tensor
    in_u_NDR: Tensor
    out_v_NRD: Tensor
    output_bias_ND: Tensor | None


@dataclass(frozen=True)
class ClusterWeights:
    """Tensors of a cluster; those of experts have the expert as their first dimension, since experts migrate one by
    one.

    Expert e has `W = B + U_e V_e` for its gate, up and output projections and computes
    `pre = x W_in + hidden_bias`, `h = silu(pre_gate) * pre_up * (1 + tanh(hidden_gate))`, `h W_out + output_bias`.
    """

    base_in_DH: Tensor  # [d, 2f]: gate | up
    base_out_FD: Tensor  # [f, d]
    in_u_NDR: Tensor  # [n, d, 2r]: U of gate | U of up
    in_v_NRH: Tensor  # [n, 2, r, f]: V of gate, V of up
    out_u_NFR: Tensor  # [n, f, r]
    out_v_NRD: Tensor  # [n, r, d]
    hidden_gate_NF: Tensor | None = None  # [n, f]; the three vectors are all present or all None
    hidden_bias_NH: Tensor | None = None  # [n, 2f]
    output_bias_ND: Tensor | None = None  # [n, d]

    @classmethod
    def without_values(
        cls, experts: int, hidden: int, expert_hidden: int, rank: int, *, vectors: bool, dtype: torch.dtype
    ) -> "ClusterWeights":
        """Return the same shapes on `meta`."""
        n, d, f, r = experts, hidden, expert_hidden, rank
        sizes: list[tuple[int, ...]] = [(d, 2 * f), (f, d), (n, d, 2 * r), (n, 2, r, f), (n, f, r), (n, r, d)]
        sizes += [(n, f), (n, 2 * f), (n, d)] if vectors else []
        return cls(*(torch.empty(size, dtype=dtype, device="meta") for size in sizes))

    @property
    def experts(self) -> int:
        """n: experts of this cluster on this rank."""
        return self.in_v_NRH.shape[0]

    @property
    def rank(self) -> int:
        """r: rank of each residual."""
        return self.in_v_NRH.shape[2]

    @property
    def expert_hidden(self) -> int:
        """f: hidden width of the base and of every expert."""
        return self.in_v_NRH.shape[3]

    def outer(self) -> OuterWeights:
        """Return the weights outside of the hidden step."""
        return OuterWeights(self.base_in_DH, self.base_out_FD, self.in_u_NDR, self.out_v_NRD, self.output_bias_ND)

    def vectors(self) -> tuple[Tensor, Tensor] | None:
        """Return the hidden units' multiplier `1 + tanh(hidden_gate)`, [n, f], and pre-activation bias, [n, 2f]."""
        return hidden_vectors(self.hidden_gate_NF, self.hidden_bias_NH)


def hidden_vectors(hidden_gate_NF: Tensor | None, hidden_bias_NH: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Compute `ClusterWeights.vectors` from the two tensors."""
    if hidden_gate_NF is None or hidden_bias_NH is None:
        return None
    return 1 + torch.tanh(hidden_gate_NF), hidden_bias_NH
