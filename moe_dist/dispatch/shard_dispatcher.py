"""Stage two of the dispatch: within a cluster group, each row is sent once to each shard that holds one of its experts.

Every shard holds the whole base, so it computes a partial sum over the experts that it holds. The partial sums are
added on the entry rank, which received the token in stage one and returns one vector to the token's source. Where
experts are sliced along their hidden width, every row is sent to all ranks, and the partial sums are over hidden units.

Shapes: R rows on the entry rank, A rows received by a shard, K chosen experts, S shards, D hidden.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.distributed.placement import ExpertPlacement

ABSENT = -1
"""Slot number of an expert that another shard holds, or that was dropped."""


class ShardRows(NamedTuple):
    """Rows on the shard of their experts; slots are counted within the shard, ABSENT for experts of other shards."""

    x_AD: Tensor
    slot_AK: Tensor
    gate_AK: Tensor


class ShardMetadata(NamedTuple):
    """Sender's metadata of a dispatch.

    Attributes:
        row_A: row of each copy sent; None: the group is this rank alone and nothing was sent.
        send, receive: copies to and from each shard.
        rows: number of rows on this rank (R).
    """

    row_A: Tensor | None
    send: list[int]
    receive: list[int]
    rows: int


@dataclass(frozen=True)
class ShardDispatcher:
    """Exchange of a cluster's rows among its shards."""

    all_to_all: AllToAll
    placement: ExpertPlacement

    def dispatch(self, x_RD: Tensor, slot_RK: Tensor, gate_RK: Tensor) -> tuple[ShardRows, ShardMetadata]:
        """Send each row to every shard that holds one of its experts; a slot may be ABSENT."""
        if self.all_to_all.alone:
            return ShardRows(x_RD, slot_RK, gate_RK), ShardMetadata(None, [], [], len(x_RD))
        per_shard = self.placement.slots_per_shard
        shard_RK = slot_RK.div(per_shard, rounding_mode="floor")  # -1 for an absent slot
        shards = torch.arange(self.all_to_all.group.size, device=x_RD.device)
        if self.placement.shards == 1:  # every rank has a slice of each expert
            held_RKS = (shard_RK >= 0)[:, :, None].expand(-1, -1, len(shards))
            self.all_to_all.observe(slot_RK.repeat(1, len(shards)), shards.repeat_interleave(slot_RK.shape[1])[None])
        else:
            held_RKS = shard_RK[:, :, None] == shards
            self.all_to_all.observe(slot_RK, shard_RK)
        wanted_RS = held_RKS.any(1)
        shard_A, row_A = wanted_RS.T.nonzero(as_tuple=True)
        count_S1 = wanted_RS.sum(0)[:, None]
        send, receive = torch.cat([count_S1, self.all_to_all.exchange_counts(count_S1)], dim=1).T.tolist()
        here_AK = held_RKS[row_A, :, shard_A]
        slot_AK = torch.where(here_AK, slot_RK[row_A] % per_shard, ABSENT).int()  # gloo: no shorter type
        rows = ShardRows(
            self.all_to_all.exchange(x_RD[row_A], send, receive, Payload.HIDDEN),
            self.all_to_all.exchange(slot_AK, send, receive, Payload.ROUTING).long(),
            self.all_to_all.exchange(gate_RK[row_A] * here_AK, send, receive, Payload.ROUTING),
        )
        return rows, ShardMetadata(row_A, send, receive, len(x_RD))

    def combine(self, y_AD: Tensor, metadata: ShardMetadata) -> Tensor:
        """Return y_RD = sum over the chosen experts of gate * expert(x), the sum of the shards' partial sums."""
        if metadata.row_A is None:
            return y_AD
        y_AD = self.all_to_all.exchange(y_AD, metadata.receive, metadata.send, Payload.HIDDEN)
        return y_AD.new_zeros(metadata.rows, y_AD.shape[1]).index_add(0, metadata.row_A, y_AD)
