"""Load balancing: strategies by name, and the selection biases and load counts of all layers.

Biases and counts are kept in float32 and int64 beside the model. They are not module buffers: a mixed-precision engine
casts those, and a bias that moves by 0.02 does not survive bfloat16.
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
        """Return an auxiliary loss of one routing decision, a sum over rows, and its weight; None: there is none."""

    def update(self, state: "BalanceState", count_LE: Tensor, placements: Sequence[ExpertPlacement]) -> None:
        """Move the selection biases by the loads of one step, summed over all ranks."""


class NoBalancing:
    """Loads are left as they are."""

    def __init__(self, moe: MoEConfig) -> None:
        """Take no option."""

    def loss(self, logits_RE: Tensor, index_RK: Tensor) -> tuple[Tensor, float] | None:
        """Return None."""
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
    """Selection biases moved by `moe.balance_rate` against each step's load error (Wang et al. 2024)."""

    def __init__(self, moe: MoEConfig) -> None:
        self._rate = moe.balance_rate

    def update(self, state: "BalanceState", count_LE: Tensor, placements: Sequence[ExpertPlacement]) -> None:
        """Move the biases of experts, and of clusters where experts are clustered."""
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
    """Selection biases, the same on all ranks, and this rank's counts since the last update.

    Shapes: L layers, G clusters, E experts (by number, whatever their slot).

    Attributes:
        dropped_L: copies beyond the capacity, among those counted or (stage one) instead of them.
        router_loss_2: balance and z-loss that have entered this rank's total since the last update.
    """

    balancer: LoadBalancer
    cluster_bias_LG: Tensor
    expert_bias_LE: Tensor
    count_LE: Tensor
    dropped_L: Tensor
    router_loss_2: Tensor
    counting: bool = field(default=True)

    @classmethod
    def create(cls, layers: int, moe: MoEConfig, device: torch.device) -> "BalanceState":
        """Return biases and counts of zero, as a run starts."""
        return cls(
            BALANCERS[moe.balance](moe),
            torch.zeros(layers, moe.clusters, device=device),
            torch.zeros(layers, moe.experts, device=device),
            torch.zeros(layers, moe.experts, dtype=torch.int64, device=device),
            torch.zeros(layers, dtype=torch.int64, device=device),
            torch.zeros(2, device=device),
        )

    def count(self, layer: int, expert_C: Tensor) -> None:
        """Add routed copies, by expert number."""
        if self.counting:
            self.count_LE[layer].scatter_add_(0, expert_C, torch.ones_like(expert_C))

    def drop(self, layer: int, keep_C: Tensor, copies: int = 1) -> None:
        """Add dropped copies; each False entry of `keep_C` stands for `copies` of them."""
        if self.counting:
            self.dropped_L[layer] += copies * (~keep_C).sum()

    def clear_counts(self) -> None:
        """Reset the counts for the next step."""
        self.count_LE.zero_()
        self.dropped_L.zero_()
        self.router_loss_2.zero_()

    def update(self, count_LE: Tensor, placements: Sequence[ExpertPlacement]) -> None:
        """Move the biases by the counts of one step, summed over all ranks and micro-batches.

        Args:
            placements: of each layer; empty: the experts are not clustered.
        """
        self.balancer.update(self, count_LE, placements)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the biases; counts are empty between two steps."""
        return {"cluster_bias_LG": self.cluster_bias_LG, "expert_bias_LE": self.expert_bias_LE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy biases in place."""
        for name, bias in self.state_dict().items():
            bias.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Move all tensors, in place."""
        for name in ("cluster_bias_LG", "expert_bias_LE", "count_LE", "dropped_L", "router_loss_2"):
            setattr(self, name, getattr(self, name).to(device))
