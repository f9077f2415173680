"""Re-clustering plan: the decision of rank 0, broadcast as one tensor and verified on all ranks.

Shapes: L layers, E experts, G clusters.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.agreement import differing_ranks
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.recluster.decision import LayerDecision
from moe_dist.recluster.exchange import Cycle, cycles_of, successors
from moe_dist.recluster.transfer import MigrationError


@dataclass(frozen=True)
class ReclusterPlan:
    """Exchanges of experts and blocks of clusters, by layer."""

    cycles: tuple[tuple[Cycle, ...], ...]
    blocks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, decisions: Sequence[LayerDecision], blocks: Sequence[tuple[int, ...]]) -> "ReclusterPlan":
        """Return the plan of the layers' decisions and the new block of every cluster."""
        return cls(tuple(decision.cycles for decision in decisions), tuple(blocks))

    @classmethod
    def nothing(cls, placements: Sequence[ExpertPlacement]) -> "ReclusterPlan":
        """Return a plan without changes."""
        return cls(((),) * len(placements), tuple(placement.block_of_cluster for placement in placements))

    def encoded(self, experts: int) -> Tensor:
        """Encode the plan as int64 [L, E + G]: the expert that takes each expert's slot, and each cluster's block."""
        rows = [
            successors(experts, cycles) + list(blocks) for cycles, blocks in zip(self.cycles, self.blocks, strict=True)
        ]
        return torch.tensor(rows)

    @classmethod
    def decoded(cls, code_LC: Tensor, experts: int) -> "ReclusterPlan":
        """Decode a tensor of `encoded`; each cycle starts with its lowest expert."""
        rows = code_LC.tolist()
        return cls(tuple(tuple(cycles_of(row[:experts])) for row in rows), tuple(tuple(row[experts:]) for row in rows))


def broadcast_plan(
    proposal: ReclusterPlan | None, placements: Sequence[ExpertPlacement], step: int, device: torch.device
) -> ReclusterPlan:
    """Broadcast rank 0's plan to all ranks; collective.

    Args:
        proposal: plan of rank 0; ignored on other ranks.
        placements: current placement of each layer.

    Raises:
        MigrationError: on every rank, if the plan, the step or the current placements differ between ranks.
    """
    experts, clusters = placements[0].experts, placements[0].clusters
    code_LC = torch.empty(len(placements), experts + clusters, dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        assert proposal is not None
        code_LC.copy_(proposal.encoded(experts))
    dist.broadcast(code_LC, src=0)
    _check_equal_on_all_ranks(code_LC, placements, step)
    return ReclusterPlan.decoded(code_LC.cpu(), experts)


def _check_equal_on_all_ranks(code_LC: Tensor, placements: Sequence[ExpertPlacement], step: int) -> None:
    content = [step, code_LC.tolist(), [placement.digest() for placement in placements]]
    digest = hashlib.sha256(str(content).encode()).digest()
    if different := differing_ranks(int.from_bytes(digest[:7], "big"), code_LC.device):
        ranks = ", ".join(map(str, different))
        raise MigrationError(
            f"step {step}: rank {ranks} disagrees with rank 0 about the plan or the current placement of experts; "
            "nothing was changed"
        )
