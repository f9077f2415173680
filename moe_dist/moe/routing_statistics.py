"""What the layers learn about their experts while they route: the material for re-clustering.

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
    """Moving averages of what this rank has routed; those of all ranks add up. Idle unless `collecting`."""

    summed_over_ranks = ("weighted_LED", "mass_LE", "together_LGG")

    activation: list[ActivationStatistics]
    """What each expert was given, by layer; counted where its cluster lives."""
    together_LGG: Tensor
    """How often two clusters were chosen by one token, float32; counted where the token lives."""
    decay: float
    collecting: bool = False

    @classmethod
    def create(cls, layers: int, hidden: int, moe: MoEConfig, decay: float) -> "RoutingStatistics":
        """Averages of nothing yet, idle until `collecting` is set."""
        activation = [ActivationStatistics.empty(moe.experts, hidden, decay) for _ in range(layers)]
        return cls(activation, torch.zeros(layers, moe.clusters, moe.clusters), decay)

    def begin_step(self) -> None:
        """Lets the past fade; called once a step, on every rank alike."""
        if self.collecting:
            for statistics in self.activation:
                statistics.begin_step()
            self.together_LGG *= self.decay

    def choose_clusters(self, layer: int, cluster_TM: Tensor, clusters: int) -> None:
        """Counts the clusters that tokens chose."""
        if self.collecting and cluster_TM.shape[1] > 1:
            chosen_TG = self.together_LGG.new_zeros(len(cluster_TM), clusters).scatter_(1, cluster_TM, 1.0)
            self.together_LGG[layer] += chosen_TG.T @ chosen_TG

    def give(self, layer: int, x_RD: Tensor, slot_RK: Tensor, gate_RK: Tensor, member_N: Tensor) -> None:
        """Counts rows that came to the experts of one cluster."""
        if self.collecting:
            self.activation[layer].update(x_RD.detach(), slot_RK, gate_RK.detach(), member_N)

    def state_dict(self) -> dict[str, Tensor]:
        """All averages, and the steps that they cover."""
        return {
            "weighted_LED": torch.stack([statistics.weighted_ED for statistics in self.activation]),
            "mass_LE": torch.stack([statistics.mass_E for statistics in self.activation]),
            "steps_L": torch.stack([statistics.steps for statistics in self.activation]),
            "together_LGG": self.together_LGG,
        }

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Goes on from there."""
        for layer, statistics in enumerate(self.activation):
            statistics.weighted_ED.copy_(state["weighted_LED"][layer])
            statistics.mass_E.copy_(state["mass_LE"][layer])
            statistics.steps = state["steps_L"][layer].clone()
        self.together_LGG.copy_(state["together_LGG"])

    def to(self, device: torch.device) -> None:
        """Moves all of it, in place."""
        self.together_LGG = self.together_LGG.to(device)
        for statistics in self.activation:
            statistics.weighted_ED, statistics.mass_E = statistics.weighted_ED.to(device), statistics.mass_E.to(device)
