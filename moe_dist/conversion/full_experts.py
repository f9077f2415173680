"""Experts as conversion takes them: full weights in float32, and tokens they are given.

Shapes: L tokens of one expert, D model width, F hidden width, H = 2 F (gate | up).
"""

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
    matrices: ExpertMatrices
    """The full weights."""
    fit_LD: Tensor
    check_LD: Tensor
    """Tokens that compression is fitted to, and others that it is checked on."""
    vectors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By `STATE_NAMES` and `VECTORS`, of an expert that has vectors: they stay as they are."""

    def hidden(self, x_LD: Tensor, matrices: ExpertMatrices) -> Tensor:
        """The hidden units of some tokens, with this expert's vectors and other matrices, [L, F]."""
        if not self.vectors:
            return matrices.hidden(x_LD)
        gate_F, bias_H, _ = (self.vectors[MASTER][name].to(x_LD) for name in VECTORS)
        gate_LF, up_LF = (x_LD @ matrices.w_in_DH + bias_H).chunk(2, dim=1)
        return functional.silu(gate_LF) * up_LF * (1 + torch.tanh(gate_F))

    def output_error(self, matrices: ExpertMatrices) -> float:
        """`|y' - y| / |y|` on the tokens held back, with other matrices; what a bias adds to the output is left out."""
        y_LD, other_LD = (self.hidden(self.check_LD, one) @ one.w_out_FD for one in (self.matrices, matrices))
        return relative_error(other_LD, y_LD)


@dataclass(frozen=True)
class FullExpertLayer:
    """The experts of a layer that this rank holds, and the ranks that together hold all of them once."""

    experts: list[FullExpert]
    holder_of: dict[int, int]
    """The rank that holds each expert of the layer, as an index into the group."""
    group: RankGroup
    kinds: tuple[str, ...]
    """Which of `STATE_NAMES` residuals come with: weights alone for a fresh optimizer, or all."""
