"""Load balancing: strategies by name, and the selection biases and load counts of all layers.

Biases and counts are float32 and int64 tensors outside the model. They are not module buffers: a mixed-precision engine
casts buffers, and bfloat16 is too coarse for the steps of a bias.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.router_losses import balance_loss
from moe_dist.moe.selection_bias import update_expert_bias, update_two_stage_bias


class LoadBalancer(Protocol):
    """Strategy that keeps the loads of experts and clusters equal."""

    def loss(self, logits_RE: Tensor, index_RK: Tensor) -> tuple[Tensor, float] | None:
        """Return the auxiliary loss of one routing decision, a sum over rows, and its weight; None: no loss."""

    def update(self, state: "BalanceState", count_LE: Tensor, placements: Sequence[ExpertPlacement]) -> None:
        """Update the selection biases by the loads of one step, summed over all ranks."""


class NoBalancing:
    """Strategy without load balancing."""

    def __init__(self, moe: MoEConfig) -> None:
        """Ignore the configuration."""

    def loss(self, logits_RE: Tensor, index_RK: Tensor) -> tuple[Tensor, float] | None:
        """Return None: there is no auxiliary loss."""
        return None

    def update(self, state: "BalanceState", count_LE: Tensor, placements: Sequence[ExpertPlacement]) -> None:
        """Leave the biases unchanged."""


class AuxLossBalancing(NoBalancing):
    """Auxiliary loss on the router (Switch Transformer), weighted by `moe.aux_loss_weight`."""

    def __init__(self, moe: MoEConfig) -> None:
        self._weight = moe.aux_loss_weight

    def loss(self, logits_RE: Tensor, index_RK: Tensor) -> tuple[Tensor, float] | None:
        """Return the loss and its weight."""
        return (balance_loss(logits_RE, index_RK), self._weight) if self._weight else None


class BiasBalancing(NoBalancing):
    """Selection biases, changed by `moe.balance_rate` against each step's load error (Wang et al. 2024)."""

    def __init__(self, moe: MoEConfig) -> None:
        self._rate = moe.balance_rate

    def update(self, state: "BalanceState", count_LE: Tensor, placements: Sequence[ExpertPlacement]) -> None:
        """Update the biases of experts, and of clusters if experts are clustered."""
        if not placements:
            update_expert_bias(state.expert_bias_LE, count_LE, self._rate)
        else:
            members = [placement.members for placement in placements]
            update_two_stage_bias(state.cluster_bias_LG, state.expert_bias_LE, count_LE, members, self._rate)


BALANCERS: dict[str, Callable[[MoEConfig], LoadBalancer]] = {
    "bias": BiasBalancing,
    "aux_loss": AuxLossBalancing,
    "none": NoBalancing,
}
"""Strategies by the value of `moe.balance`."""


@dataclass
class BalanceState:
    """Selection biases, the same on all ranks, and this rank's load counts since the last update.

    Shapes: L layers, G clusters, E experts (by expert number, not by slot).

    Attributes:
        count_LE: copies routed to each expert since the last update; those dropped by experts are included.
        dropped_L: copies dropped beyond the capacity. Copies dropped in stage one are not in `count_LE`.
        router_loss_2: balance loss and z-loss added to this rank's total loss since the last update.
        loss_scale: factor of the gradients that attached losses get, as of those of the total loss (float16).
        counting: False: loads are not counted.
    """

    balancer: LoadBalancer
    cluster_bias_LG: Tensor
    expert_bias_LE: Tensor
    count_LE: Tensor
    dropped_L: Tensor
    router_loss_2: Tensor
    loss_scale: float = 1.0
    counting: bool = field(default=True)

    @classmethod
    def create(cls, layers: int, moe: MoEConfig, device: torch.device) -> "BalanceState":
        """Return the initial state of a run: zero biases and counts."""
        return cls(
            BALANCERS[moe.balance](moe),
            torch.zeros(layers, moe.clusters, device=device),
            torch.zeros(layers, moe.experts, device=device),
            torch.zeros(layers, moe.experts, dtype=torch.int64, device=device),
            torch.zeros(layers, dtype=torch.int64, device=device),
            torch.zeros(2, device=device),
        )

    def count(self, layer: int, expert_C: Tensor) -> None:
        """Add routed copies to the counts; `expert_C` holds expert numbers."""
        if self.counting:
            self.count_LE[layer].scatter_add_(0, expert_C, torch.ones_like(expert_C))

    def drop(self, layer: int, keep_C: Tensor, copies: int = 1) -> None:
        """Add dropped copies to the counts; each False entry of `keep_C` counts as `copies` copies."""
        if self.counting:
            self.dropped_L[layer] += copies * (~keep_C).sum()

    def clear_counts(self) -> None:
        """Reset the counts for the next step."""
        self.count_LE.zero_()
        self.dropped_L.zero_()
        self.router_loss_2.zero_()

    def update(self, count_LE: Tensor, placements: Sequence[ExpertPlacement]) -> None:
        """Update the biases by the counts of one step, summed over all ranks and micro-batches.

        Args:
            placements: placement of each layer; empty: the experts are not clustered.
        """
        self.balancer.update(self, count_LE, placements)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the biases; counts are zero between two steps."""
        return {"cluster_bias_LG": self.cluster_bias_LG, "expert_bias_LE": self.expert_bias_LE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy biases in place."""
        for name, bias in self.state_dict().items():
            bias.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Move all tensors, in place."""
        for name in ("cluster_bias_LG", "expert_bias_LE", "count_LE", "dropped_L", "router_loss_2"):
            setattr(self, name, getattr(self, name).to(device))
