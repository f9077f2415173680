"""Routing statistics of the layers, collected for re-clustering.

Shapes: L layers, G clusters, T tokens, M chosen clusters, R rows of one cluster, N its experts, K chosen experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.clustering import ActivationStatistics
from moe_dist.config import MoEConfig


@dataclass
class RoutingStatistics:
    """Moving averages over this rank's routed tokens; those of all ranks are summed. Inactive unless `collecting`."""

    summed_over_ranks = ("weighted_LED", "mass_LE", "together_LGG")

    activation: list[ActivationStatistics]
    """Activation statistics of each layer's experts, updated on the rank of the cluster."""
    together_LGG: Tensor
    """Number of tokens that chose both of two clusters, float32, updated on the rank of the token."""
    decay: float
    collecting: bool = False

    @classmethod
    def create(cls, layers: int, hidden: int, moe: MoEConfig, decay: float) -> "RoutingStatistics":
        """Return empty statistics, inactive until `collecting` is set."""
        activation = [ActivationStatistics.empty(moe.experts, hidden, decay) for _ in range(layers)]
        return cls(activation, torch.zeros(layers, moe.clusters, moe.clusters), decay)

    def begin_step(self) -> None:
        """Decay the averages; to be called once per step, on every rank."""
        if self.collecting:
            for statistics in self.activation:
                statistics.begin_step()
            self.together_LGG *= self.decay

    def record_clusters(self, layer: int, cluster_TM: Tensor, clusters: int) -> None:
        """Count the pairs of clusters that tokens chose."""
        if self.collecting and cluster_TM.shape[1] > 1:
            chosen_TG = self.together_LGG.new_zeros(len(cluster_TM), clusters).scatter_(1, cluster_TM, 1.0)
            self.together_LGG[layer] += chosen_TG.T @ chosen_TG

    def record_rows(self, layer: int, x_RD: Tensor, slot_RK: Tensor, gate_RK: Tensor, member_N: Tensor) -> None:
        """Add the rows routed to the experts of one cluster."""
        if self.collecting:
            self.activation[layer].update(x_RD.detach(), slot_RK, gate_RK.detach(), member_N)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all averages, and the number of steps that they cover."""
        return {
            "weighted_LED": torch.stack([statistics.weighted_ED for statistics in self.activation]),
            "mass_LE": torch.stack([statistics.mass_E for statistics in self.activation]),
            "steps_L": torch.stack([statistics.steps for statistics in self.activation]),
            "together_LGG": self.together_LGG,
        }

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Restore the averages in place."""
        for layer, statistics in enumerate(self.activation):
            statistics.weighted_ED.copy_(state["weighted_LED"][layer])
            statistics.mass_E.copy_(state["mass_LE"][layer])
            statistics.steps = state["steps_L"][layer].clone()
        self.together_LGG.copy_(state["together_LGG"])

    def to(self, device: torch.device) -> None:
        """Move all tensors, in place."""
        self.together_LGG = self.together_LGG.to(device)
        for statistics in self.activation:
            statistics.weighted_ED, statistics.mass_E = statistics.weighted_ED.to(device), statistics.mass_E.to(device)
