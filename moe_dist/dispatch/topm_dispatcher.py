"""Dispatch of each token to several clusters (m > 1): one copy is sent to each rank that holds a chosen cluster.

The token's logits for the destination's clusters are sent with each row, and the log-mass (logsumexp) of the result is
returned with it. Outputs of clusters on one rank are combined there; those of several ranks are weighted against each
other at the source. The nested softmaxes equal one softmax of (cluster logit + expert logit) over all chosen experts.

Shapes: T tokens of this rank, R rows sent or received, N rows of one cluster, D hidden, G clusters, M chosen clusters,
B blocks (ranks of the group), L clusters per block, C chunks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import AllToAll, PendingRows
from moe_dist.dispatch.chunked_overlap import Division, joined, receive_chunks, return_chunks
from moe_dist.dispatch.dispatcher import ClusterRouting, ComputedChunk, DispatchedChunk
from moe_dist.dispatch.permute import count
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.distributed.placement import ExpertPlacement

NEVER = float("-inf")


class TopMMetadata(NamedTuple):
    """Sender's metadata of a dispatch: block and token of each row sent, in the order of sending."""

    division: Division
    block_R: Tensor
    token_R: Tensor
    tokens: int


class _ChosenRows(NamedTuple):
    """Cluster logits of a chunk's rows (-inf: not chosen), and the rows of each local cluster."""

    x_RD: Tensor
    logits_RL: Tensor
    row_NL: list[Tensor]


@dataclass(frozen=True)
class TopMDispatcher:
    """Cluster dispatcher for several clusters per token.

    Attributes:
        chunks: number of chunks that are exchanged and computed in turn; the same on all ranks of the group.
    """

    all_to_all: AllToAll
    placement: ExpertPlacement
    chunks: int = 1
    single_cluster: bool = False

    def dispatch(self, x_TD: Tensor, routing: ClusterRouting) -> tuple[Iterator[DispatchedChunk], TopMMetadata]:
        """Send a copy of each token to every rank that holds a kept cluster (`ClusterDispatcher.dispatch`)."""
        logits_TG, kept_TM = routing.logits_TG, routing.keep_TM
        if kept_TM is None:
            kept_TM = torch.ones_like(routing.cluster_TM, dtype=torch.bool)
        chosen_TG = torch.zeros_like(logits_TG, dtype=torch.bool).scatter_(1, routing.cluster_TM, kept_TM)
        if self.all_to_all.observed:
            cluster_TG = torch.arange(logits_TG.shape[1], device=x_TD.device).where(chosen_TG, -1)
            block_G = torch.tensor(self.placement.block_of_cluster, device=x_TD.device)
            self.all_to_all.observe(cluster_TG, block_G[cluster_TG])
        in_order_G = self.placement.clusters_in_block_order()
        blocks = self.all_to_all.group.size
        logits_TBL = logits_TG.masked_fill(~chosen_TG, NEVER)[:, in_order_G].unflatten(1, (blocks, -1))
        block_R, token_R = chosen_TG[:, in_order_G].unflatten(1, (blocks, -1)).any(-1).T.nonzero(as_tuple=True)
        count_B1 = count(block_R, blocks).view(-1, 1)
        chunks = 1 if self.all_to_all.alone else self.chunks
        division = Division.of(count_B1, self.all_to_all.exchange_counts(count_B1), chunks)
        block_R, token_R = division.reorder(block_R), division.reorder(token_R)
        x_C, logits_C = division.split(x_TD[token_R]), division.split(logits_TBL[token_R, block_R])

        def start(chunk: int) -> list[PendingRows]:
            return self._start(x_C[chunk], logits_C[chunk], division.send[chunk], division.receive[chunk])

        received = receive_chunks(division.chunks, start)
        return (_by_cluster(*rows) for rows in received), TopMMetadata(division, block_R, token_R, len(x_TD))

    def combine(self, computed: Iterable[ComputedChunk], metadata: TopMMetadata) -> Tensor:
        """Sum each token's results, weighted by softmax over all chosen experts; zero if all were dropped."""
        division, block_R, token_R, tokens = metadata

        def start(chunk: int, result: ComputedChunk) -> list[PendingRows]:
            return self._start(*_weighted_sum(result), division.receive[chunk], division.send[chunk])

        y_RD, mass_R = (joined(parts) for parts in zip(*return_chunks(computed, start), strict=True))
        if self.all_to_all.alone and len(token_R) == tokens:  # one row per token, in order, whose weights sum to one
            return y_RD
        mass_TB = mass_R.new_full((tokens, self.all_to_all.group.size), NEVER)
        weight_TB = mass_TB.index_put((token_R, block_R), mass_R).softmax(dim=1)
        weighted_RD = (weight_TB[token_R, block_R, None] * y_RD).to(y_RD.dtype)
        return y_RD.new_zeros(tokens, y_RD.shape[1]).index_add(0, token_R, weighted_RD)

    def _start(self, x_RD: Tensor, routing: Tensor, send: list[int], receive: list[int]) -> list[PendingRows]:
        """Start the exchange of hidden vectors, and that of each row's routing data."""
        return [
            self.all_to_all.start(x_RD, send, receive, Payload.HIDDEN),
            self.all_to_all.start(routing, send, receive, Payload.ROUTING),
        ]


def _by_cluster(x_RD: Tensor, logits_RL: Tensor) -> DispatchedChunk:
    """Select for each local cluster the rows whose logit for it is finite."""
    row_NL = [column_R.isfinite().nonzero()[:, 0] for column_R in logits_RL.detach().T]
    rows_L = [x_RD.index_select(0, row_N) for row_N in row_NL]
    return DispatchedChunk(rows_L, _ChosenRows(x_RD, logits_RL, row_NL))


def _weighted_sum(result: ComputedChunk) -> tuple[Tensor, Tensor]:
    """Combine the outputs of a chunk's clusters; return (y_RD, log_mass_R) of its rows."""
    metadata: _ChosenRows = result.metadata
    mass_RL = metadata.logits_RL
    for cluster, (row_N, output) in enumerate(zip(metadata.row_NL, result.outputs_L, strict=True)):
        index = (row_N, torch.full_like(row_N, cluster))
        mass_RL = mass_RL.index_put(index, output.log_mass_R, accumulate=True)
    weight_RL = mass_RL.softmax(dim=1)
    y_RD = torch.zeros_like(metadata.x_RD)
    for cluster, (row_N, output) in enumerate(zip(metadata.row_NL, result.outputs_L, strict=True)):
        y_RD = y_RD.index_add(0, row_N, (weight_RL[row_N, cluster, None] * output.y_RD).to(y_RD.dtype))
    return y_RD, mass_RL.logsumexp(dim=1)
