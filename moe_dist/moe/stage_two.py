"""Stage two on the rank of a cluster: choose experts, dispatch to shards, compute, combine.

Shapes: R rows of one cluster, D hidden, L clusters of this rank, N experts of a cluster, K chosen experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.dispatch.dispatcher import ClusterOutput, ComputedChunk, DispatchedChunk
from moe_dist.dispatch.shard_dispatcher import ABSENT, ShardDispatcher
from moe_dist.moe.attached_loss import attach_router_losses
from moe_dist.moe.capacity import capacity_of, within_capacity
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.quantized_experts import QuantizedClusterExperts
from moe_dist.moe.scoring import Scoring
from moe_dist.moe.two_stage_routing import choose_experts, router_logits


@dataclass(frozen=True)
class StageTwo:
    """Experts of this rank's clusters for one micro-batch of the group's ranks.

    Attributes:
        member_LN, embedding_LND: numbers and router embeddings of the experts of each local cluster.
        tokens: number of tokens that each rank of the group routes, for the scale of losses and the capacity.
        ranks: number of ranks of the stage-one group.
        only_gate: True if the router gets its gradient from the experts' gates alone (m = 1).
    """

    layer: int
    moe: MoEConfig
    context: LayerContext
    dispatcher: ShardDispatcher
    clusters: Sequence[ClusteredExperts | QuantizedClusterExperts]
    member_LN: Tensor
    embedding_LND: Tensor
    tokens: int
    ranks: int
    loss_scale: float
    only_gate: bool

    def __call__(self, chunk: DispatchedChunk) -> ComputedChunk:
        """Compute the rows of all local clusters."""
        return chunk.computed([self.run_cluster(local, x_RD) for local, x_RD in enumerate(chunk.rows_L)])

    def run_cluster(self, local: int, x_RD: Tensor) -> ClusterOutput:
        """Choose the experts of the rows of one local cluster and compute them."""
        member_N, balance = self.member_LN[local], self.context.balance
        logits_RN = router_logits(x_RD, self.embedding_LND[local])
        bias_N = balance.expert_bias_LE[self.layer][member_N]
        choice = choose_experts(
            logits_RN, bias_N, self.moe.top_k, self.only_gate, self.moe.normalize_gates, Scoring.of(self.moe)
        )
        balance.count(self.layer, member_N[choice.slot_RK.flatten()])
        if self.context.statistics is not None and balance.counting:
            self.context.statistics.record_rows(self.layer, x_RD, choice.slot_RK, choice.gate_RK, member_N)
        scale = self.loss_scale / max(1, self.tokens)
        gate_RK = attach_router_losses(
            choice.gate_RK, logits_RN, choice.slot_RK, balance, self.moe.z_loss_weight, scale
        )
        slot_RK, gate_RK = self._within_capacity(choice.slot_RK, gate_RK)
        rows, metadata = self.dispatcher.dispatch(x_RD, slot_RK, gate_RK)
        y_AD = cast(Tensor, self.clusters[local](*rows))
        return ClusterOutput(self.dispatcher.combine(y_AD, metadata), choice.log_mass_R)

    def _within_capacity(self, slot_RK: Tensor, gate_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Drop copies beyond an expert's share of all copies that the ranks of the group route."""
        moe = self.moe
        if moe.capacity_factor is None:
            return slot_RK, gate_RK
        copies = self.tokens * self.ranks * moe.top_clusters * moe.top_k
        capacity = capacity_of(copies, moe.experts, moe.capacity_factor)
        keep_C = within_capacity(slot_RK.flatten(), self.dispatcher.placement.slots, capacity)
        self.context.balance.drop(self.layer, keep_C)
        keep_RK = keep_C.view_as(slot_RK)
        return slot_RK.masked_fill(~keep_RK, ABSENT), gate_RK * keep_RK
