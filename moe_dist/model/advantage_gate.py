"""The gate of a token's one cluster: 1, with a gradient that tells the router which tokens a cluster serves best.

What the loss gains from a larger gate is mostly what it would gain from a larger output of the whole layer: the same
for all tokens of a cluster, and nothing about routing. As a router's gradient it only drives the clusters' logits
apart, faster than balancing can follow. So the mean over the cluster's tokens, as of the step before, is taken from it:
what is left is an advantage, as in policy gradients (REINFORCE with a baseline, Williams 1992).

Shapes: L layers, T tokens, G clusters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class GateBaseline:
    """Mean gradient of the gates by layer and cluster in the last step, the same on all ranks, and this step's sums.

    In units of the gradient of one token's own loss, so that batch sizes and layouts do not show.
    """

    mean_LG: Tensor
    sum_2LG: Tensor
    """This rank's sums of gradients, and numbers of tokens, float64."""

    @classmethod
    def create(cls, layers: int, clusters: int, device: torch.device) -> "GateBaseline":
        sums = torch.zeros(2, layers, clusters, dtype=torch.float64, device=device)
        return cls(torch.zeros(layers, clusters, device=device), sums)

    def note(self, layer: int, grad_T: Tensor, cluster_T: Tensor) -> None:
        """Enters gradients of this step."""
        sums, numbers = self.sum_2LG[:, layer]
        sums.index_add_(0, cluster_T, grad_T.double())
        numbers.index_add_(0, cluster_T, torch.ones_like(grad_T, dtype=torch.float64))

    def finish_step(self, sum_2LG: Tensor) -> None:
        """Takes the sums over all ranks; a cluster that had no token keeps its mean."""
        sums, numbers = sum_2LG.to(self.mean_LG.device)
        self.mean_LG = torch.where(numbers > 0, sums / numbers.clamp(min=1), self.mean_LG.double()).float()
        self.sum_2LG.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """What outlives a step."""
        return {"mean_LG": self.mean_LG}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Takes the means over."""
        self.mean_LG.copy_(state["mean_LG"])

    def to(self, device: torch.device) -> None:
        """Moves all of it, in place."""
        self.mean_LG, self.sum_2LG = self.mean_LG.to(device), self.sum_2LG.to(device)


def advantage_gate(logits_TG: Tensor, cluster_T1: Tensor, baseline: GateBaseline, layer: int, scale: float) -> Tensor:
    """gate_T1 = 1, with the gradient of log softmax(logits)[cluster] times the advantage.

    Args:
        scale: of a token's loss within the loss that is differentiated.
    """
    gate_T1: Tensor = _AdvantageGate.apply(logits_TG, cluster_T1, baseline, layer, scale)  # type: ignore[no-untyped-call]
    return gate_T1


class _AdvantageGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TG: Tensor, cluster_T1: Tensor, baseline: GateBaseline, layer: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward(logits_TG.softmax(dim=-1), cluster_T1)
        ctx.baseline, ctx.layer, ctx.scale = baseline, layer, scale
        return torch.ones_like(logits_TG[:, :1])

    @staticmethod
    def backward(ctx: Any, grad_T1: Tensor) -> tuple[Tensor, None, None, None, None]:
        probability_TG, cluster_T1 = ctx.saved_tensors
        mean_T1 = ctx.baseline.mean_LG[ctx.layer][cluster_T1].to(grad_T1.dtype)
        ctx.baseline.note(ctx.layer, grad_T1[:, 0] / ctx.scale, cluster_T1[:, 0])
        advantage_T1 = grad_T1 - mean_T1 * ctx.scale
        chosen_TG = torch.zeros_like(probability_TG).scatter_(1, cluster_T1, 1.0)
        return advantage_T1 * (chosen_TG - probability_TG), None, None, None, None
