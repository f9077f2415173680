"""Stage one: each token hops to the ranks of its clusters, one copy for each destination rank, and one vector returns.

With one cluster a token (M=1) the rows' order and counts say which cluster they are for, so that nothing but the
vectors travels. With several, each row carries the token's logits for the destination's clusters, and the log-mass of
what was computed comes back: partial sums of clusters on one rank are combined there, and those of several ranks are
weighed against each other at the source. The nested softmaxes equal one softmax over all chosen experts.

Shapes: T tokens here, R rows arrived, D hidden, G clusters, M chosen clusters, B blocks (ranks of the group),
L clusters a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import AllToAll, PendingRows
from moe_dist.dispatch.chunked_overlap import Division, joined, pipelined
from moe_dist.dispatch.permute import count, group_order, inverse, permuted
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.dispatch.wire_format import depart
from moe_dist.distributed.placement import ExpertPlacement

NEVER = float("-inf")

ClusterFunction = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(local cluster index, x_RD) -> (y_RD, log_mass_R): what the experts of one cluster make of its rows."""


@dataclass(frozen=True)
class StageOne:
    """Takes tokens to their clusters, has them computed there, and brings the results back.

    Attributes:
        chunks: that take turns on the wire and in computation; the same on all ranks of the group.
    """

    channel: AllToAll
    placement: ExpertPlacement
    wire_dtype: torch.dtype
    chunks: int = 1

    def run_single(self, x_TD: Tensor, cluster_T: Tensor, compute: ClusterFunction) -> Tensor:
        """M=1: returns y_TD, what cluster `cluster_T` makes of each token (ungated)."""
        if self.channel.ledger.observer is not None:
            self._observe(cluster_T[:, None])
        position_T = inverse(self._clusters_in_order(x_TD.device))[cluster_T]
        order_T = position_T.argsort(stable=True)
        count_BL = count(position_T, self.placement.clusters).view(self.channel.group.size, -1)
        division = Division.of(count_BL, self.channel.exchange_counts(count_BL), self._chunks)
        order_T = division.reorder(order_T)
        back_T = inverse(order_T)
        x_C = division.split(permuted(x_TD, order_T, back_T))
        y_C = pipelined(
            division.chunks,
            lambda c: [self._depart(x_C[c], division.send[c], division.receive[c])],
            lambda c, arrived: [self._compute_disjoint(arrived[0], division, c, compute)],
            lambda c, results: [self._depart(results[0], division.receive[c], division.send[c])],
        )
        return permuted(joined([y_RD for (y_RD,) in y_C]), back_T, order_T)

    def run_several(self, x_TD: Tensor, logits_TG: Tensor, chosen_TG: Tensor, compute: ClusterFunction) -> Tensor:
        """M>1: returns y_TD, weighted by softmax over all chosen experts of (cluster logit + expert logit).

        Args:
            chosen_TG: which clusters each token goes to, bool; a token that goes to none gets zeros.
        """
        if self.channel.ledger.observer is not None:
            self._observe(torch.arange(logits_TG.shape[1], device=x_TD.device).where(chosen_TG, -1))
        in_order_G, shape = self._clusters_in_order(x_TD.device), (self.channel.group.size, -1)
        logits_TBL = logits_TG.masked_fill(~chosen_TG, NEVER)[:, in_order_G].unflatten(1, shape)
        block_R, token_R = chosen_TG[:, in_order_G].unflatten(1, shape).any(-1).T.nonzero(as_tuple=True)
        count_B1 = count(block_R, self.channel.group.size).view(-1, 1)
        division = Division.of(count_B1, self.channel.exchange_counts(count_B1), self._chunks)
        block_R, token_R = division.reorder(block_R), division.reorder(token_R)
        x_C, logits_C = division.split(x_TD[token_R]), division.split(logits_TBL[token_R, block_R])
        results_C = pipelined(
            division.chunks,
            lambda c: self._depart_with(x_C[c], logits_C[c], division.send[c], division.receive[c]),
            lambda c, arrived: self._compute_overlapping(arrived[0], arrived[1], compute),
            lambda c, results: self._depart_with(results[0], results[1], division.receive[c], division.send[c]),
        )
        y_RD, mass_R = (joined(parts) for parts in zip(*results_C, strict=True))
        if self.channel.alone and len(token_R) == len(x_TD):  # all are here, in order, and their weights sum to one
            return y_RD
        mass_TB = mass_R.new_full((x_TD.shape[0], self.channel.group.size), NEVER)
        weight_TB = mass_TB.index_put((token_R, block_R), mass_R).softmax(dim=1)
        weighted_RD = (weight_TB[token_R, block_R, None] * y_RD).to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_R, weighted_RD)

    def _observe(self, cluster_TK: Tensor) -> None:
        block_G = torch.tensor(self.placement.block_of_cluster, device=cluster_TK.device)
        self.channel.observe(cluster_TK, block_G[cluster_TK])

    @property
    def _chunks(self) -> int:
        return 1 if self.channel.alone else self.chunks

    def _depart(self, x_RD: Tensor, send: list[int], receive: list[int]) -> PendingRows:
        return depart(self.channel, x_RD, send, receive, self.wire_dtype)

    def _depart_with(self, x_RD: Tensor, routing: Tensor, send: list[int], receive: list[int]) -> list[PendingRows]:
        """Hidden vectors, and what of the routing goes with each."""
        return [
            self._depart(x_RD, send, receive),
            self.channel.depart(routing, send, receive, Payload.ROUTING),
        ]

    def _clusters_in_order(self, device: torch.device) -> Tensor:
        """cluster_G: the clusters as they stand on the ranks of the group, block by block."""
        blocks = range(self.placement.blocks)
        return torch.tensor([c for block in blocks for c in self.placement.clusters_of_block(block)], device=device)

    @staticmethod
    def _compute_disjoint(x_RD: Tensor, division: Division, chunk: int, compute: ClusterFunction) -> Tensor:
        """Each row belongs to one local cluster; the rows of a chunk come by source, then by cluster."""
        count_BL, per_cluster = division.received_CPL[chunk], division.received_of[chunk]
        blocks, clusters = count_BL.shape
        if clusters == 1:
            return compute(0, x_RD)[0]
        if blocks == 1:  # one source: the clusters' rows are runs already
            return torch.cat([compute(cluster, run)[0] for cluster, run in enumerate(x_RD.split(per_cluster))])
        order_R = group_order(count_BL, len(x_RD))
        back_R = inverse(order_R)
        runs = permuted(x_RD, order_R, back_R).split(per_cluster)
        return permuted(torch.cat([compute(cluster, run)[0] for cluster, run in enumerate(runs)]), back_R, order_R)

    @staticmethod
    def _compute_overlapping(x_RD: Tensor, logits_RL: Tensor, compute: ClusterFunction) -> tuple[Tensor, Tensor]:
        """A row belongs to every local cluster whose logit is finite; returns the combined (y_RD, log_mass_R)."""
        rows_L = [column_R.isfinite().nonzero()[:, 0] for column_R in logits_RL.detach().T]
        results = [compute(cluster, x_RD.index_select(0, row_N)) for cluster, row_N in enumerate(rows_L)]
        mass_RL = logits_RL
        for cluster, (row_N, (_, log_mass_N)) in enumerate(zip(rows_L, results, strict=True)):
            index = (row_N, torch.full_like(row_N, cluster))
            mass_RL = mass_RL.index_put(index, log_mass_N, accumulate=True)
        weight_RL = mass_RL.softmax(dim=1)
        y_RD = torch.zeros_like(x_RD)
        for cluster, (row_N, (y_ND, _)) in enumerate(zip(rows_L, results, strict=True)):
            y_RD = y_RD.index_add(0, row_N, (weight_RL[row_N, cluster, None] * y_ND).to(y_RD.dtype))
        return y_RD, mass_RL.logsumexp(dim=1)
