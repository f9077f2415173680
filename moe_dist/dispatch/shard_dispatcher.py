"""Stage two: inside a cluster group, rows go to the shards that hold their chosen experts, one copy a shard.

Every shard holds the whole base, so it computes its share of the sum over chosen experts; the shares are added at the
rank where the token entered the cluster, and one vector goes back to the token's source.

Shapes: R rows at the entry rank, A rows arrived at a shard, K chosen experts, S shards, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.dispatch.wire_format import travel
from moe_dist.distributed.placement import ExpertPlacement

ABSENT = -1

ShardFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_AD, slot_AK, gate_AK) -> y_AD, slots counted within the shard, ABSENT where an expert lives elsewhere."""


@dataclass(frozen=True)
class StageTwo:
    """Spreads a cluster's rows over its shards and adds up what they make of them."""

    channel: AllToAll
    placement: ExpertPlacement
    wire_dtype: torch.dtype

    def run(self, x_RD: Tensor, slot_RK: Tensor, gate_RK: Tensor, compute: ShardFunction) -> Tensor:
        """Returns y_RD = sum over the chosen experts of gate * expert(x); a slot may be ABSENT."""
        if self.channel.alone:
            return compute(x_RD, slot_RK, gate_RK)
        per_shard = self.placement.slots_per_shard
        shard_RK = slot_RK.div(per_shard, rounding_mode="floor")  # of an absent slot: -1, no shard
        self.channel.observe(slot_RK, shard_RK)
        wanted_RS = (shard_RK[:, :, None] == torch.arange(self.channel.group.size, device=x_RD.device)).any(1)
        shard_A, row_A = wanted_RS.T.nonzero(as_tuple=True)
        count_S1 = wanted_RS.sum(0)[:, None]
        send, receive = torch.cat([count_S1, self.channel.exchange_counts(count_S1)], dim=1).T.tolist()
        here_AK = shard_RK[row_A] == shard_A[:, None]
        slot_AK = torch.where(here_AK, slot_RK[row_A] % per_shard, ABSENT).int()  # gloo carries nothing shorter
        x_AD = self._travel(x_RD[row_A], send, receive)
        slot_AK = self.channel.exchange_rows(slot_AK, send, receive, Payload.ROUTING).long()
        gate_AK = self.channel.exchange_rows(gate_RK[row_A] * here_AK, send, receive, Payload.ROUTING)
        y_AD = self._travel(compute(x_AD, slot_AK, gate_AK), receive, send)
        return torch.zeros_like(x_RD).index_add(0, row_A, y_AD)

    def _travel(self, x_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return travel(self.channel, x_RD, send, receive, self.wire_dtype)
