"""Exchange of low-rank expert states between the ranks that computed them and the ranks of their new clusters.

Shapes: W float32 entries of one expert's state, N experts here.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import ExpertResidual
from moe_dist.distributed.mesh import RankGroup
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.gathered_optimizer_state import GatheredOptimizerState
from moe_dist.engine.optimizer_state import MASTER

STACKED = {
    "in_u_DR": "in_u_NDR",
    "in_v_RH": "in_v_NRH",
    "out_u_FR": "out_u_NFR",
    "out_v_RD": "out_v_NRD",
    "hidden_gate_F": "hidden_gate_NF",
    "hidden_bias_H": "hidden_bias_NH",
    "output_bias_D": "output_bias_ND",
}
"""Name of the tensor that stacks an expert's tensor for all experts of its cluster."""

ResidualState = dict[str, ExpertResidual]
"""Residuals by the names of `STATE_NAMES` that are present."""


def exchange_residuals(
    made: dict[int, ResidualState],
    like: ResidualState,
    source_of: Mapping[int, int],
    owner_of: Mapping[int, int],
    group: RankGroup,
    rank: int,
) -> dict[int, ResidualState]:
    """Send every expert's state to the rank that owns it; collective.

    Args:
        made: states that this rank computed, by expert.
        like: any expert's state, for shapes.
        source_of: rank that computed each expert, as an index into the group.
        owner_of: rank that will own each expert, as an index into the group.
    """
    me = group.ranks.index(rank)
    leaving = sorted(made, key=lambda expert: (owner_of[expert], expert))
    coming = sorted((e for e in source_of if owner_of[e] == me), key=lambda expert: (source_of[expert], expert))
    rows_NW = _exchange(
        torch.stack([_packed(made[expert]) for expert in leaving]) if made else _packed(like)[None, :][:0],
        [sum(owner_of[expert] == peer for expert in leaving) for peer in range(group.size)],
        [sum(source_of[expert] == peer for expert in coming) for peer in range(group.size)],
        group,
    )
    return {expert: _unpacked(row_W, like) for expert, row_W in zip(coming, rows_NW, strict=True)}


def owner_ranks(placement: ExpertPlacement) -> dict[int, int]:
    """Return the rank of every expert, as an index into the group that together holds all experts once."""
    return {
        expert: block * placement.shards + shard
        for cluster, block in enumerate(placement.block_of_cluster)
        for shard in range(placement.shards)
        for expert in placement.experts_of(cluster, shard)
    }


def stack_states(states: list[ResidualState]) -> dict[str, GatheredOptimizerState]:
    """Stack the states of a cluster's local experts, in slot order, by the names of `ClusterWeights`."""
    return {
        STACKED[name]: {kind: torch.stack([getattr(state[kind], name) for state in states]) for kind in states[0]}
        for name, value in vars(states[0][MASTER]).items()
        if value is not None
    }


def bytes_moved(like: ResidualState, source_of: Mapping[int, int], owner_of: Mapping[int, int]) -> int:
    """Return the bytes of the states that change ranks."""
    return sum(owner_of[e] != maker for e, maker in source_of.items()) * _packed(like).numel() * 4


def _exchange(rows_NW: Tensor, send: list[int], receive: list[int], group: RankGroup) -> Tensor:
    if group.size == 1:
        return rows_NW
    received_NW = rows_NW.new_empty(sum(receive), rows_NW.shape[1])
    dist.all_to_all_single(received_NW, rows_NW, receive, send, group=group.handle)
    return received_NW


def _packed(state: ResidualState) -> Tensor:
    tensors = (value for kind in state for value in vars(state[kind]).values() if value is not None)
    return torch.cat([value.flatten() for value in tensors])


def _unpacked(row_W: Tensor, like: ResidualState) -> ResidualState:
    found, first = {}, 0
    for kind in like:
        fields: dict[str, Tensor | None] = {}
        for name, value in vars(like[kind]).items():
            fields[name] = None if value is None else row_W[first : first + value.numel()].view_as(value)
            first += 0 if value is None else value.numel()
        found[kind] = ExpertResidual(**fields)  # type: ignore[arg-type]
    return found
