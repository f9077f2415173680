"""Activation statistics: moving averages of the tokens routed to each expert, weighted by the router.

Both averages are sums that start from zero and decay together, so that they are linear in the tokens: micro-batches and
ranks may add to them in any order, and the sums of ranks that counted the same steps add up to those of one rank. An
expert's history therefore need not be sent when it moves.

Shapes: E experts, N experts of one cluster, D model width, R rows (tokens), K experts of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNUSED_MASS = 1e-30
"""Mass below which an expert counts as unused: decayed sums end in rounding noise, not in zero."""


@dataclass
class ActivationStatistics:
    """Decayed sums over steps s up to t, with decay b: `sum_s b^(t-s) (...)`. The tensors are the whole state."""

    weighted_ED: Tensor  # sum of weight * token, float32
    mass_E: Tensor  # sum of weight, float32
    steps: Tensor  # sum of 1 = (1 - b^t) / (1 - b), for bias correction; float64 scalar
    decay: float

    @classmethod
    def empty(
        cls, experts: int, hidden: int, decay: float, device: torch.device | str | None = None
    ) -> "ActivationStatistics":
        """Create the statistics before the first step.

        Args:
            hidden: D, the model's width.

        Raises:
            ValueError: a decay outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of activation statistics must be in [0, 1), not {decay}")
        weighted_ED = torch.zeros(experts, hidden, device=device)
        return cls(weighted_ED, weighted_ED.new_zeros(experts), torch.zeros((), dtype=torch.float64), decay)

    @classmethod
    def merged(cls, ranks: Sequence["ActivationStatistics"]) -> "ActivationStatistics":
        """Add up the statistics of all ranks, as a sum over ranks of `weighted_ED` and `mass_E` does.

        Raises:
            ValueError: their steps or decays differ.
        """
        first = ranks[0]
        if any(not torch.equal(one.steps, first.steps) or one.decay != first.decay for one in ranks):
            raise ValueError("activation statistics of different steps or decays cannot be merged")
        weighted_ED = torch.stack([one.weighted_ED for one in ranks]).sum(0)
        return cls(weighted_ED, torch.stack([one.mass_E for one in ranks]).sum(0), first.steps.clone(), first.decay)

    def begin_step(self) -> None:
        """Decay the sums; called once a step, before its tokens, on every rank."""
        self.weighted_ED *= self.decay
        self.mass_E *= self.decay
        self.steps = self.steps * self.decay + 1

    @torch.no_grad()
    def update(self, x_RD: Tensor, slot_RK: Tensor, weight_RK: Tensor, expert_N: Tensor | None = None) -> None:
        """Add tokens of the current step.

        Args:
            x_RD: routed rows, any floating type.
            slot_RK: experts of each row, as indices into `expert_N`, int64; -1: none.
            weight_RK: router weight of each.
            expert_N: candidate experts of the rows, int64; None: all.
        """
        weight_RK = weight_RK.float().masked_fill(slot_RK < 0, 0.0)
        if expert_N is None:
            expert_N = torch.arange(len(self.mass_E), device=x_RD.device)
        weight_RN = weight_RK.new_zeros(len(x_RD), len(expert_N))
        weight_RN.scatter_add_(1, slot_RK.clamp(min=0), weight_RK)
        self.weighted_ED.index_add_(0, expert_N, weight_RN.T @ x_RD.float())
        self.mass_E.index_add_(0, expert_N, weight_RN.sum(0))

    def reset(self) -> None:
        """Reset the sums to zero, since values that are not finite would never decay."""
        for tensor in (self.weighted_ED, self.mass_E, self.steps):
            tensor.zero_()

    @property
    def seen(self) -> Tensor:
        """Mask [E] of experts whose tokens have not decayed away; NaN counts as seen."""
        return ~(self.mass_E < UNUSED_MASS)

    def mean_mass(self) -> Tensor:
        """Return the moving average of router weight per step, bias-corrected by (1 - b^t) / (1 - b), float32 [E]."""
        return self.mass_E / self.steps.to(self.mass_E).clamp(min=1.0)

    def centroids(self) -> Tensor:
        """Return the moving average of weight * token over that of weight, float32 [E, D]; 0 for an unused expert.

        Both start from zero and lack the same factor 1 - b^t, so their quotient is free of that bias.
        """
        return torch.where(self.seen[:, None], self.weighted_ED / self.mass_E[:, None], 0.0)
