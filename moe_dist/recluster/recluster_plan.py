"""One decision for all ranks: what the deciding rank found, as one tensor that all receive and agree upon.

Shapes: L layers, E experts, G clusters.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.recluster.decision import LayerDecision
from moe_dist.recluster.exchange import Cycle, cycles_of, successors
from moe_dist.recluster.transfer import MigrationError


@dataclass(frozen=True)
class ReclusterPlan:
    """Which experts change places and which clusters change ranks, by layer."""

    cycles: tuple[tuple[Cycle, ...], ...]
    blocks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, decisions: Sequence[LayerDecision], blocks: Sequence[tuple[int, ...]]) -> "ReclusterPlan":
        """The decisions of all layers and the new block of every cluster, as one value."""
        return cls(tuple(decision.cycles for decision in decisions), tuple(blocks))

    @classmethod
    def nothing(cls, placements: Sequence[ExpertPlacement]) -> "ReclusterPlan":
        """All stays as it is."""
        return cls(((),) * len(placements), tuple(placement.block_of_cluster for placement in placements))

    def encoded(self, experts: int) -> Tensor:
        """int64 [L, E + G]: by expert who takes its seat, by cluster its block."""
        rows = [
            successors(experts, cycles) + list(blocks) for cycles, blocks in zip(self.cycles, self.blocks, strict=True)
        ]
        return torch.tensor(rows)

    @classmethod
    def decoded(cls, code_LC: Tensor, experts: int) -> "ReclusterPlan":
        """The verdict that an encoded tensor stands for, each cycle beginning at its lowest expert."""
        rows = code_LC.tolist()
        return cls(tuple(tuple(cycles_of(row[:experts])) for row in rows), tuple(tuple(row[experts:]) for row in rows))


def broadcast_plan(
    verdict: ReclusterPlan | None, placements: Sequence[ExpertPlacement], step: int, device: torch.device
) -> ReclusterPlan:
    """Rank 0's verdict on every rank; collective.

    Args:
        verdict: what rank 0 decided; other ranks' is not read.

    Raises:
        MigrationError: on every rank, if they disagree about the verdict, the step, or where experts are now.
    """
    experts, clusters = placements[0].experts, placements[0].clusters
    code_LC = torch.empty(len(placements), experts + clusters, dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        assert verdict is not None
        code_LC.copy_(verdict.encoded(experts))
    dist.broadcast(code_LC, src=0)
    _require_agreement(code_LC, placements, step)
    return ReclusterPlan.decoded(code_LC.cpu(), experts)


def _require_agreement(code_LC: Tensor, placements: Sequence[ExpertPlacement], step: int) -> None:
    content = [step, code_LC.tolist(), [placement.digest() for placement in placements]]
    digest = hashlib.sha256(str(content).encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:7], "big")], device=code_LC.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    different = [rank for rank, other in enumerate(found) if not torch.equal(other, found[0])]
    if different:
        ranks = ", ".join(map(str, different))
        raise MigrationError(
            f"step {step}: rank {ranks} disagrees with rank 0 about where experts are or should go; nothing was changed"
        )
