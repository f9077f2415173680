"""Dispatch of each token to one cluster (m = 1), which the order of rows and the counts define.

Shapes: T tokens of this rank, R rows received, K tokens kept, D hidden, B blocks (ranks of the group), L clusters per
block, C chunks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.dispatch.advantage_gate import advantage_gate
from moe_dist.dispatch.all_to_all import AllToAll, PendingRows
from moe_dist.dispatch.chunked_overlap import Division, joined, receive_chunks, return_chunks
from moe_dist.dispatch.dispatcher import ClusterRouting, ComputedChunk, DispatchedChunk
from moe_dist.dispatch.permute import count, group_order, inverse, permuted
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.distributed.placement import ExpertPlacement


class Top1Metadata(NamedTuple):
    """Sender's metadata of a dispatch.

    Attributes:
        kept_K: tokens within the capacity; None: all.
        order_T, back_T: permutation of the kept tokens to the order of sending, and its inverse.
    """

    routing: ClusterRouting
    division: Division
    kept_K: Tensor | None
    order_T: Tensor
    back_T: Tensor


class _RowOrder(NamedTuple):
    """Permutation of a chunk's rows from (source, cluster) to (cluster, source) order and back; None: in order."""

    order_R: Tensor | None
    back_R: Tensor | None


@dataclass(frozen=True)
class Top1Dispatcher:
    """Cluster dispatcher for one cluster per token.

    Attributes:
        chunks: number of chunks that are exchanged and computed in turn; the same on all ranks of the group.
    """

    all_to_all: AllToAll
    placement: ExpertPlacement
    chunks: int = 1
    single_cluster: bool = True

    def dispatch(self, x_TD: Tensor, routing: ClusterRouting) -> tuple[Iterator[DispatchedChunk], Top1Metadata]:
        """Send each kept token to the rank of its cluster (`ClusterDispatcher.dispatch`)."""
        cluster_T, kept_K = routing.cluster_TM[:, 0], None
        if routing.keep_TM is not None:
            kept_K = routing.keep_TM[:, 0].nonzero()[:, 0]
            x_TD, cluster_T = x_TD.index_select(0, kept_K), cluster_T[kept_K]
        if self.all_to_all.observed:
            block_G = torch.tensor(self.placement.block_of_cluster, device=x_TD.device)
            self.all_to_all.observe(cluster_T[:, None], block_G[cluster_T[:, None]])
        position_T = inverse(torch.tensor(self.placement.clusters_in_block_order(), device=x_TD.device))[cluster_T]
        order_T = position_T.argsort(stable=True)
        count_BL = count(position_T, self.placement.clusters).view(self.all_to_all.group.size, -1)
        chunks = 1 if self.all_to_all.alone else self.chunks
        division = Division.of(count_BL, self.all_to_all.exchange_counts(count_BL), chunks)
        order_T = division.reorder(order_T)
        metadata = Top1Metadata(routing, division, kept_K, order_T, inverse(order_T))
        x_C = division.split(permuted(x_TD, order_T, metadata.back_T))

        def start(chunk: int) -> list[PendingRows]:
            splits = (division.send[chunk], division.receive[chunk])
            return [self.all_to_all.start(x_C[chunk], *splits, Payload.HIDDEN)]

        received = enumerate(receive_chunks(division.chunks, start))
        return (_by_cluster(x_RD, division, chunk) for chunk, (x_RD,) in received), metadata

    def combine(self, computed: Iterable[ComputedChunk], metadata: Top1Metadata) -> Tensor:
        """Return results to their tokens; the gate is 1 and only has a gradient (`advantage_gate`)."""
        division, routing = metadata.division, metadata.routing

        def start(chunk: int, result: ComputedChunk) -> list[PendingRows]:
            splits = (division.receive[chunk], division.send[chunk])
            return [self.all_to_all.start(_by_source(result), *splits, Payload.HIDDEN)]

        y_C = [y_RD for (y_RD,) in return_chunks(computed, start)]
        y_TD = permuted(joined(y_C), metadata.back_T, metadata.order_T)
        if metadata.kept_K is not None:
            y_TD = y_TD.new_zeros(len(routing.cluster_TM), y_TD.shape[1]).index_copy(0, metadata.kept_K, y_TD)
        return advantage_gate(y_TD, routing.logits_TG, routing.cluster_TM, routing.sequences, routing.sequence_group)


def _by_cluster(x_RD: Tensor, division: Division, chunk: int) -> DispatchedChunk:
    """Split the rows of a chunk, sorted by (source, cluster), into those of each cluster."""
    count_BL, per_cluster = division.received_CPL[chunk], division.received_of[chunk]
    blocks, clusters = count_BL.shape
    if clusters == 1:
        return DispatchedChunk((x_RD,), _RowOrder(None, None))
    if blocks == 1:  # one source: the clusters' rows are contiguous already
        return DispatchedChunk(x_RD.split(per_cluster), _RowOrder(None, None))
    order_R = group_order(count_BL, len(x_RD))
    back_R = inverse(order_R)
    return DispatchedChunk(permuted(x_RD, order_R, back_R).split(per_cluster), _RowOrder(order_R, back_R))


def _by_source(result: ComputedChunk) -> Tensor:
    """Concatenate the outputs of a chunk's clusters in the order in which its rows were received."""
    y_RD = joined([output.y_RD for output in result.outputs_L])
    metadata: _RowOrder = result.metadata
    if metadata.order_R is None or metadata.back_R is None:
        return y_RD
    return permuted(y_RD, metadata.back_R, metadata.order_R)
