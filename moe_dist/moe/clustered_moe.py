"""The clustered MoE layer: two-stage routing, dispatch along the clusters, experts that share a base.

Shapes: T tokens, R rows of one cluster, D hidden, G clusters, L clusters of this rank, N experts of a cluster,
M chosen clusters, K chosen experts.
"""

from functools import partial

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig, MoEConfig
from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.cluster_dispatcher import ClusterFunction, StageOne
from moe_dist.dispatch.shard_dispatcher import ABSENT, StageTwo
from moe_dist.dispatch.traffic_ledger import Stage
from moe_dist.distributed.mesh import GroupKind
from moe_dist.moe.advantage_gate import advantage_gate
from moe_dist.moe.attached_loss import attach_router_losses
from moe_dist.moe.capacity import capacity_of, within_capacity
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.quantized_experts import QuantizedClusterExperts
from moe_dist.moe.router import Router
from moe_dist.moe.two_stage_routing import choose_clusters, choose_experts, router_logits


class ClusteredMoE(nn.Module):
    """Feed-forward layer of clustered experts; takes and returns [S, B, D] (or [S, D]: one sequence)."""

    member_GN: Tensor

    def __init__(
        self, layer: int, model: ModelConfig, moe: MoEConfig, context: LayerContext, loss_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.layer, self.moe, self.context, self.balance = layer, moe, context, context.balance
        self.loss_scale = loss_scale
        self.router = Router(layer, moe.experts, model, context.seed)
        held = context.placements[layer].clusters_of_block(context.mesh.at.cluster)
        self.clusters = nn.ModuleList(
            ClusteredExperts(layer, cluster, model, moe, context) for cluster in (() if context.stored else held)
        )
        self.one = AllToAll(context.mesh.group(GroupKind.STAGE_ONE), context.ledger, layer, Stage.ONE)
        self.two = AllToAll(context.mesh.group(GroupKind.CLUSTER), context.ledger, layer, Stage.TWO)
        self._chunks = 1 if moe.overlap_chunks == "auto" else moe.overlap_chunks
        self.register_buffer("member_GN", torch.empty(0), persistent=False)
        self.follow_placement()

    def follow_placement(self) -> None:
        """Routes by `context.placements[layer]`, from now on; the weights must be where it says."""
        self.placement = self.context.placements[self.layer]
        self.member_GN = torch.tensor(self.placement.members, device=self.router.weight_ED.device)
        wire_dtype = getattr(torch, self.moe.wire_dtype)
        self.stage_one = StageOne(self.one, self.placement, wire_dtype, self._chunks)
        self.stage_two = StageTwo(self.two, self.placement, wire_dtype)

    def divide(self, chunks: int) -> None:
        """Rows travel to their clusters in so many chunks from now on (`dispatch/overlap.py`); on all ranks alike."""
        self._chunks = chunks
        self.follow_placement()

    def forward(self, hidden: Tensor) -> Tensor:
        """As `hidden`: what the layer adds to the residual stream. Collective over the layer's ranks."""
        x_TD = hidden.flatten(0, -2)
        loss_scale = self.loss_scale / max(1, len(x_TD))
        logits_TG = self.router.cluster_logits(x_TD, self.member_GN)
        cluster_TM = choose_clusters(logits_TG, self.balance.cluster_bias_LG[self.layer], self.moe.top_clusters)
        if self.context.statistics is not None and self.balance.counting:
            self.context.statistics.choose_clusters(self.layer, cluster_TM, self.placement.clusters)
        compute, sequences = self.local_clusters(len(x_TD)), hidden.shape[1:-1].numel()
        y_TD = self._run_stage_one(x_TD, logits_TG, cluster_TM, sequences, compute)
        if self.moe.gate_scale != 1:
            y_TD = y_TD * self.moe.gate_scale
        y_TD = attach_router_losses(y_TD, logits_TG, cluster_TM, self.moe, loss_scale, self.balance)
        return y_TD.view_as(hidden)

    def local_clusters(self, tokens: int) -> ClusterFunction:
        """What this rank's clusters make of rows, where each rank routes `tokens`; collective."""
        block = self.context.mesh.at.cluster
        embedding_LND = self.router.local_embeddings(self.placement, self.member_GN, self.one, block)
        member_LN = self.member_GN[list(self.placement.clusters_of_block(block))]
        return partial(self._run_cluster, member_LN, embedding_LND, tokens)

    def _run_stage_one(
        self, x_TD: Tensor, logits_TG: Tensor, cluster_TM: Tensor, sequences: int, compute: ClusterFunction
    ) -> Tensor:
        keep_TM = self._clusters_within_capacity(cluster_TM)
        if self.moe.top_clusters > 1:
            kept_TM = torch.ones_like(cluster_TM, dtype=torch.bool) if keep_TM is None else keep_TM
            chosen_TG = torch.zeros_like(logits_TG, dtype=torch.bool).scatter_(1, cluster_TM, kept_TM)
            return self.stage_one.run_several(x_TD, logits_TG, chosen_TG, compute)
        if keep_TM is None:
            y_TD = self.stage_one.run_single(x_TD, cluster_TM[:, 0], compute)
        else:
            kept_R = keep_TM[:, 0].nonzero()[:, 0]
            y_RD = self.stage_one.run_single(x_TD.index_select(0, kept_R), cluster_TM[kept_R, 0], compute)
            y_TD = torch.zeros_like(x_TD).index_copy(0, kept_R, y_RD)
        return advantage_gate(y_TD, logits_TG, cluster_TM, sequences)

    def _clusters_within_capacity(self, cluster_TM: Tensor) -> Tensor | None:
        if self.moe.capacity_factor is None:
            return None
        capacity = capacity_of(cluster_TM.numel(), self.moe.clusters, self.moe.capacity_factor)
        keep_C = within_capacity(cluster_TM.flatten(), self.moe.clusters, capacity)
        self.balance.drop(self.layer, keep_C, self.moe.top_k)
        return keep_C.view_as(cluster_TM)

    def _run_cluster(
        self, member_LN: Tensor, embedding_LND: Tensor, tokens: int, local: int, x_RD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Chooses the experts of the rows of one local cluster and computes them."""
        member_N = member_LN[local]
        logits_RN = router_logits(x_RD, embedding_LND[local])
        bias_N = self.balance.expert_bias_LE[self.layer][member_N]
        choice = choose_experts(logits_RN, bias_N, self.moe.top_k, only_gate=self.moe.top_clusters == 1)
        self.balance.count(self.layer, member_N[choice.slot_RK.flatten()])
        if self.context.statistics is not None and self.balance.counting:
            self.context.statistics.give(self.layer, x_RD, choice.slot_RK, choice.gate_RK, member_N)
        loss_scale = self.loss_scale / max(1, tokens)
        gate_RK = attach_router_losses(choice.gate_RK, logits_RN, choice.slot_RK, self.moe, loss_scale, self.balance)
        slot_RK, gate_RK = self._slots_within_capacity(choice.slot_RK, gate_RK, tokens)
        experts = self.clusters[local]
        assert isinstance(experts, ClusteredExperts | QuantizedClusterExperts)
        return self.stage_two.run(x_RD, slot_RK, gate_RK, experts), choice.log_mass_R

    def _slots_within_capacity(self, slot_RK: Tensor, gate_RK: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Drops what is beyond an expert's share of all copies that the ranks of the group route, each of `tokens`."""
        moe = self.moe
        if moe.capacity_factor is None:
            return slot_RK, gate_RK
        copies = tokens * self.one.group.size * moe.top_clusters * moe.top_k
        capacity = capacity_of(copies, moe.experts, moe.capacity_factor)
        keep_C = within_capacity(slot_RK.flatten(), self.placement.slots, capacity)
        self.balance.drop(self.layer, keep_C)
        keep_RK = keep_C.view_as(slot_RK)
        return slot_RK.masked_fill(~keep_RK, ABSENT), gate_RK * keep_RK
