"""State shared by the MoE layers of a model, and the sizes with which a layer is created."""

from dataclasses import dataclass
from typing import Protocol

import torch

from moe_dist.compression import StorageFormat
from moe_dist.config import MoEConfig
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.routing_statistics import RoutingStatistics


class LayerSizes(Protocol):
    """Width of the model and standard deviations of the initial weights; `ModelConfig` implements it."""

    @property
    def hidden_size(self) -> int:
        """Width of the model (D)."""

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights."""

    @property
    def output_init_std(self) -> float:
        """Standard deviation of the weights that add to the residual stream."""


@dataclass(frozen=True)
class StandaloneSizes:
    """Sizes of a standalone layer."""

    hidden_size: int
    init_std: float
    output_init_std: float


@dataclass(frozen=True)
class LayerContext:
    """State shared by all MoE layers of a model.

    Attributes:
        placements: placement of each layer's experts, replaced by re-clustering; empty if experts are not clustered.
        statistics: routing statistics for re-clustering; None if there is no re-clustering.
        fake_quantize_as: format to which the forward pass fake-quantizes experts (precision.residuals=qat); None: no
            fake quantization.
        memory: memory tiers to which clusters are offloaded; None: clusters stay on the device.
        quantized: True if layers are created without clusters, which are loaded in quantized form later.
    """

    mesh: Mesh
    placements: list[ExpertPlacement]
    balance: BalanceState
    ledger: TrafficLedger
    seed: int
    statistics: RoutingStatistics | None = None
    fake_quantize_as: StorageFormat | None = None
    memory: ExpertMemory | None = None
    quantized: bool = False

    @classmethod
    def standalone(cls, moe: MoEConfig, mesh: Mesh, seed: int, ledger: TrafficLedger | None = None) -> "LayerContext":
        """Return the context of a single layer, with its own balance state and traffic ledger."""
        placements = []
        if moe.layer_kind.clustered:
            placements = [ExpertPlacement.contiguous(moe.experts, moe.clusters, mesh.shape)]
        balance = BalanceState.create(1, moe, torch.device("cpu"))
        return cls(mesh, placements, balance, ledger or TrafficLedger(Links.alone()), seed)
