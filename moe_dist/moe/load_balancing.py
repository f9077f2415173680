"""Selection biases and load counts of all layers, kept in float32 and int64 beside the model.

They are not module buffers: a mixed-precision engine casts those, and a bias that moves by 0.02 does not survive
bfloat16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.selection_bias import update_expert_bias, update_two_stage_bias


@dataclass
class BalanceState:
    """Biases as they enter the choices, the same on all ranks, and this rank's counts since the last update.

    Shapes: L layers, G clusters, E experts (by number, whatever their slot).
    """

    cluster_bias_LG: Tensor
    expert_bias_LE: Tensor
    count_LE: Tensor
    dropped_L: Tensor
    """Copies beyond the capacity, among those counted or (stage one) instead of them."""
    router_loss_2: Tensor
    """Balance and z-loss as they have entered this rank's total since the last update."""
    counting: bool = field(default=True)

    @classmethod
    def create(cls, layers: int, moe: MoEConfig, device: torch.device) -> "BalanceState":
        """Biases and counts of zero, as a run starts."""
        return cls(
            torch.zeros(layers, moe.clusters, device=device),
            torch.zeros(layers, moe.experts, device=device),
            torch.zeros(layers, moe.experts, dtype=torch.int64, device=device),
            torch.zeros(layers, dtype=torch.int64, device=device),
            torch.zeros(2, device=device),
        )

    def count(self, layer: int, expert_C: Tensor) -> None:
        """Enters routed copies, by expert number."""
        if self.counting:
            self.count_LE[layer].scatter_add_(0, expert_C, torch.ones_like(expert_C))

    def drop(self, layer: int, keep_C: Tensor, copies: int = 1) -> None:
        """Enters what was not kept; each entry of `keep_C` stands for that many copies."""
        if self.counting:
            self.dropped_L[layer] += copies * (~keep_C).sum()

    def clear_counts(self) -> None:
        """Starts the next step's account."""
        self.count_LE.zero_()
        self.dropped_L.zero_()
        self.router_loss_2.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """What outlives a step: the biases; counts are empty between two steps."""
        return {"cluster_bias_LG": self.cluster_bias_LG, "expert_bias_LE": self.expert_bias_LE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes biases over, in place."""
        for name, bias in self.state_dict().items():
            bias.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Moves all of it, in place."""
        for name in ("cluster_bias_LG", "expert_bias_LE", "count_LE", "dropped_L", "router_loss_2"):
            setattr(self, name, getattr(self, name).to(device))

    def update(self, count_LE: Tensor, moe: MoEConfig, placements: Sequence[ExpertPlacement]) -> None:
        """Moves the biases by the counts of one step, summed over all ranks and micro-batches.

        Args:
            placements: of each layer; empty: the experts are not clustered.
        """
        if moe.balance != "bias":
            return
        if not placements:
            update_expert_bias(self.expert_bias_LE, count_LE, moe.balance_rate)
        else:
            members = [placement.members for placement in placements]
            update_two_stage_bias(self.cluster_bias_LG, self.expert_bias_LE, count_LE, members, moe.balance_rate)
