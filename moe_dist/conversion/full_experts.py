"""Input of conversion: full expert weights in float32, loaded one expert at a time, and calibration tokens.

Shapes: L tokens of one expert, D model width, F hidden width, H = 2 F (gate | up).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.compression import ExpertMatrices, relative_error
from moe_dist.distributed.mesh import RankGroup
from moe_dist.engine.optimizer_state import MASTER

VECTORS = ("hidden_gate_F", "hidden_bias_H", "output_bias_D")


@dataclass(frozen=True)
class FullExpert:
    """One expert on the rank that holds it."""

    number: int
    load: Callable[[], ExpertMatrices]
    """Return the full weights; not collective."""
    fit_LD: Tensor
    check_LD: Tensor
    """Tokens for validation; `fit_LD` are those that compression is fitted to."""
    vectors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Vectors by `STATE_NAMES` and `VECTORS`, for an expert that has them; compression keeps them."""

    def hidden(self, x_LD: Tensor, matrices: ExpertMatrices) -> Tensor:
        """Compute the hidden units of some tokens with other matrices and this expert's vectors, [L, F]."""
        if not self.vectors:
            return matrices.hidden(x_LD)
        gate_F, bias_H, _ = (self.vectors[MASTER][name].to(x_LD) for name in VECTORS)
        gate_LF, up_LF = (x_LD @ matrices.w_in_DH + bias_H).chunk(2, dim=1)
        return functional.silu(gate_LF) * up_LF * (1 + torch.tanh(gate_F))

    def output_error(self, matrices: ExpertMatrices, exact: ExpertMatrices) -> float:
        """Return `|y' - y| / |y|` on the validation tokens with other matrices, without the output bias."""
        y_LD, other_LD = (self.hidden(self.check_LD, one) @ one.w_out_FD for one in (exact, matrices))
        return relative_error(other_LD, y_LD)


@dataclass(frozen=True)
class FullExpertLayer:
    """Experts of a layer on this rank, and the ranks that together hold all of them once."""

    experts: list[FullExpert]
    holder_of: dict[int, int]
    """Rank that holds each expert of the layer, as an index into the group."""
    group: RankGroup
    kinds: tuple[str, ...]
    """Names of `STATE_NAMES` that residuals have: weights alone for a new optimizer, or all."""
    zeros: ExpertMatrices
    """Zeros in the shapes of an expert's weights, float32."""
    shared: ExpertMatrices | None = None
    """First level of two-level bases; None: each cluster has a full base."""
