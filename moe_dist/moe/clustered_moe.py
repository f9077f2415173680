"""Clustered MoE layer: two-stage routing, dispatch to clusters and shards, experts that share a base.

Shapes: T tokens, D hidden, G clusters, L clusters of this rank, N experts of a cluster, M chosen clusters.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.config import MoEConfig
from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.dispatcher import ClusterDispatcher, ClusterRouting
from moe_dist.dispatch.shard_dispatcher import ShardDispatcher
from moe_dist.dispatch.top1_dispatcher import Top1Dispatcher
from moe_dist.dispatch.topm_dispatcher import TopMDispatcher
from moe_dist.dispatch.traffic_ledger import Stage, TrafficLedger
from moe_dist.dispatch.wire_format import wire_format_of
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.moe.attached_loss import attach_router_losses
from moe_dist.moe.capacity import capacity_of, within_capacity
from moe_dist.moe.clustered_experts import ClusteredExperts, SharedBase
from moe_dist.moe.dense_feed_forward import SharedExpert
from moe_dist.moe.layer_context import LayerContext, LayerSizes
from moe_dist.moe.layer_state import load_routing_state, save_routing_state
from moe_dist.moe.moe_layer import MoELayer
from moe_dist.moe.quantized_experts import QuantizedClusterExperts
from moe_dist.moe.router import Router
from moe_dist.moe.stage_two import StageTwo
from moe_dist.moe.standalone import standalone
from moe_dist.moe.two_stage_routing import choose_clusters


class ClusteredMoE(MoELayer):
    """Feed-forward layer of clustered experts; takes and returns [S, B, D] (or [S, D]: one sequence).

    Forward and backward passes are collective over the ranks of its mesh. `state_dict()` contains weights, selection
    biases and the members of the clusters.
    """

    member_GN: Tensor

    def __init__(
        self,
        hidden_size: int,
        moe: MoEConfig,
        *,
        mesh: Mesh | DeviceMesh | None = None,
        seed: int = 0,
        init_std: float = 0.02,
        output_init_std: float | None = None,
        ledger: TrafficLedger | None = None,
    ) -> None:
        """Create a layer for use in any model.

        Args:
            hidden_size: width of the model.
            moe: configuration of the layer.
            mesh: ranks that share the experts (a DeviceMesh is converted by `Mesh.from_device_mesh`); None: all ranks
                of the default process group, or a single process if there is none.
            seed: seed of the initial values, which do not depend on the mesh.
            init_std: standard deviation of the initial weights.
            output_init_std: standard deviation of the weights that add to the residual stream; None: `init_std`.
            ledger: traffic ledger of the all-to-alls; None: a new one (`layer.context.ledger`).

        Raises:
            ConfigError: `moe.kind` is not 'clustered', or the clusters cannot be divided over the mesh.
        """
        sizes, context = standalone("clustered", hidden_size, moe, mesh, seed, init_std, output_init_std, ledger)
        self._build(0, sizes, moe, context, 1.0)

    def _build(self, layer: int, sizes: LayerSizes, moe: MoEConfig, context: LayerContext, loss_scale: float) -> None:
        super()._build(layer, sizes, moe, context, loss_scale)
        self.router = Router.of_experts(layer, moe.experts, sizes, context.seed)
        held = () if context.quantized else context.placements[layer].clusters_of_block(context.mesh.at.cluster)
        self.shared_base = SharedBase(layer, sizes, moe, context.seed) if moe.two_level_base else None
        self.clusters = nn.ModuleList(
            ClusteredExperts(layer, cluster, sizes, moe, context, self.shared_base) for cluster in held
        )
        self.shared = SharedExpert.of_layer(layer, sizes, moe, context.seed)
        mesh, hidden_format = context.mesh, wire_format_of(getattr(torch, moe.wire_dtype))
        self.stage_one = AllToAll(mesh.group(GroupKind.STAGE_ONE), context.ledger, layer, Stage.ONE, hidden_format)
        self.stage_two = AllToAll(mesh.group(GroupKind.CLUSTER), context.ledger, layer, Stage.TWO, hidden_format)
        self._chunks = 1 if moe.overlap_chunks == "auto" else moe.overlap_chunks
        self.register_buffer("member_GN", torch.empty(0), persistent=False)
        self.follow_placement()
        self.register_state_dict_post_hook(save_routing_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(load_routing_state)  # type: ignore[no-untyped-call]

    def follow_placement(self) -> None:
        """Route by `context.placements[layer]` from now on; the weights must already be placed accordingly."""
        self.placement = self.context.placements[self.layer]
        self.member_GN = torch.tensor(self.placement.members, device=self.router.weight_ED.device)
        dispatcher = Top1Dispatcher if self.moe.top_clusters == 1 else TopMDispatcher
        self.dispatcher: ClusterDispatcher = dispatcher(self.stage_one, self.placement, self._chunks)
        self.shard_dispatcher = ShardDispatcher(self.stage_two, self.placement)

    def set_chunks(self, chunks: int) -> None:
        """Exchange rows in `chunks` chunks from now on (`dispatch/chunked_overlap.py`); the same on all ranks."""
        self._chunks = chunks
        self.follow_placement()

    def set_backend(self, backend: str) -> None:
        """Compute the experts by this backend from now on (`moe.backend`)."""
        for experts in cast(list[ClusteredExperts], self.clusters):
            experts.backend = backend

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's addition to the residual stream, in the shape of `hidden`; collective."""
        x_TD = hidden.flatten(0, -2)
        sequences = hidden.shape[1:-1].numel()
        routing = self.route(x_TD, sequences)
        experts = self.local_experts(len(x_TD))
        chunks, metadata = self.dispatcher.dispatch(x_TD, routing)
        computed = map(experts, chunks)  # lazy: a chunk is computed while the next one is exchanged
        y_TD = self.dispatcher.combine(computed, metadata)
        if self.moe.gate_scale != 1:
            y_TD = y_TD * self.moe.gate_scale
        scale = self.loss_scale / max(1, len(x_TD))
        y_TD = attach_router_losses(
            y_TD, routing.logits_TG, routing.cluster_TM, self.balance, self.moe.z_loss_weight, scale
        )
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(hidden)

    def route(self, x_TD: Tensor, sequences: int) -> ClusterRouting:
        """Choose the clusters of each token (stage one)."""
        logits_TG = self.router.cluster_logits(x_TD, self.member_GN)
        cluster_TM = choose_clusters(logits_TG, self.balance.cluster_bias_LG[self.layer], self.moe.top_clusters)
        if self.context.statistics is not None and self.balance.counting:
            self.context.statistics.record_clusters(self.layer, cluster_TM, self.placement.clusters)
        keep_TM = None
        if self.moe.capacity_factor is not None:
            capacity = capacity_of(cluster_TM.numel(), self.moe.clusters, self.moe.capacity_factor)
            keep_C = within_capacity(cluster_TM.flatten(), self.moe.clusters, capacity)
            self.balance.drop(self.layer, keep_C, self.moe.top_k)
            keep_TM = keep_C.view_as(cluster_TM)
        return ClusterRouting(logits_TG, cluster_TM, keep_TM, sequences, self.context.mesh.sequence_group)

    def local_experts(self, tokens: int) -> StageTwo:
        """Return stage two for a micro-batch of `tokens` tokens on each rank; collective."""
        block = self.context.mesh.at.cluster
        embedding_LND = self.router.local_embeddings(self.placement, self.member_GN, self.stage_one, block)
        member_LN = self.member_GN[list(self.placement.clusters_of_block(block))]
        return StageTwo(
            self.layer,
            self.moe,
            self.context,
            self.shard_dispatcher,
            cast(list[ClusteredExperts | QuantizedClusterExperts], self.clusters),
            member_LN,
            embedding_LND,
            tokens,
            self.stage_one.group.size,
            self.loss_scale,
            self.dispatcher.single_cluster,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "ClusteredMoE":
        """Move the balance state with the layer if it is not shared with other layers."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if len(self.balance.count_LE) == 1:
            self.balance.to(self.router.weight_ED.device)
        return self
