"""Trace of routing decisions: the rows that the dispatch sends, and the fewest that the same routing requires.

Shapes: R rows, K choices of a row, P ranks of a group, N nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_dist.dispatch.traffic_ledger import Stage

Key = tuple[int, Stage]


@dataclass
class RowDemand:
    """Rows of this rank in one layer and stage, by destination."""

    group: tuple[int, ...]
    moved_P: Tensor
    """Rows sent to each rank: one for each chosen expert in the flat dispatch, one for each rank in stages one, two."""
    needed_P: Tensor
    """Rows with at least one choice on each rank; each row counts once per rank."""
    nodes: int
    """Pairs of a row and another node that holds at least one of its choices."""


@dataclass
class RoutingTrace:
    """Routing observer that counts the demand for rows and keeps the choices of the first rows.

    Attributes:
        rank: this rank.
        node_of_rank: node of every rank.
        keep: number of rows of each layer and stage whose choices are kept, for a simulation of the same routing.
        needs: demand by layer and stage.
        choices: choices kept by layer and stage, on the CPU.
    """

    rank: int
    node_of_rank: Sequence[int]
    keep: int = 0
    needs: dict[Key, RowDemand] = field(default_factory=dict)
    choices: dict[Key, list[Tensor]] = field(default_factory=dict)

    def see(self, layer: int, stage: Stage, group: Sequence[int], choice_RK: Tensor, owner_RK: Tensor) -> None:
        """Count one routing decision (`RoutingObserver.see`)."""
        on_P = owner_RK[:, :, None] == torch.arange(len(group), device=owner_RK.device)
        on_RKP = on_P & (choice_RK >= 0)[:, :, None]
        needed_RP = on_RKP.any(dim=1)
        moved_P = (on_RKP.sum(dim=1) if stage is Stage.FLAT else needed_RP).sum(dim=0)
        nodes = self._nodes(needed_RP, group)
        zero_P = torch.zeros_like(moved_P)
        needs = self.needs.setdefault((layer, stage), RowDemand(tuple(group), zero_P, zero_P, 0))
        needs.moved_P = needs.moved_P + moved_P
        needs.needed_P = needs.needed_P + needed_RP.sum(dim=0)
        needs.nodes += nodes
        kept = self.choices.setdefault((layer, stage), [])
        left = self.keep - sum(len(rows) for rows in kept)
        if left > 0:
            kept.append(choice_RK[:left].detach().cpu())

    def _nodes(self, needed_RP: Tensor, group: Sequence[int]) -> int:
        node_P = torch.tensor([self.node_of_rank[rank] for rank in group], device=needed_RP.device)
        others = sorted({self.node_of_rank[rank] for rank in group} - {self.node_of_rank[self.rank]})
        return sum(int(needed_RP[:, node_P == node].any(dim=1).sum()) for node in others)
