"""What every MoE layer of a model shares: where it is, and where it keeps account."""

from dataclasses import dataclass

from moe_dist.compression import StorageFormat
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.routing_statistics import RoutingStatistics


@dataclass(frozen=True)
class LayerContext:
    """One value for all layers of a model."""

    mesh: Mesh
    placements: list[ExpertPlacement]
    """Where each layer's experts are; empty unless experts are clustered. A re-clustering replaces entries."""
    balance: BalanceState
    ledger: TrafficLedger
    seed: int
    statistics: RoutingStatistics | None = None
    """What re-clustering reads; None where nothing will be re-clustered."""
    seen_as: StorageFormat | None = None
    """What the forward pass sees of experts under training (precision.residuals=qat); None: their parameters."""
    memory: ExpertMemory | None = None
    """Keeps the clusters' parameters; None where they are in memory all the time."""
    stored: bool = False
    """Layers are made without clusters, and are given them in their stored form."""
