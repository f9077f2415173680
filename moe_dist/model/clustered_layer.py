"""The clustered MoE layer: two-stage routing, dispatch along the clusters, experts that share a base.

Shapes: T tokens, R rows of one cluster, A rows at a shard, D hidden, F expert hidden, G clusters, N experts of a
cluster, M chosen clusters, K chosen experts.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moe_dist.compression import ClusterWeights, clustered_experts, init_base, init_residual
from moe_dist.config import ModelConfig, MoEConfig
from moe_dist.dispatch.channel import Channel
from moe_dist.dispatch.stage_one import ClusterFunction, StageOne
from moe_dist.dispatch.stage_two import ABSENT, StageTwo
from moe_dist.dispatch.traffic import Stage, TrafficLedger
from moe_dist.model.attached_loss import attach_router_losses
from moe_dist.model.balance_state import BalanceState
from moe_dist.model.initial import SHARED, generator
from moe_dist.model.parameter_class import ParameterClass, mark
from moe_dist.routing.capacity import capacity_of, within_capacity
from moe_dist.routing.two_stage import (
    choose_clusters,
    choose_experts,
    cluster_prototypes,
    router_logits,
    single_cluster_gate,
)
from moe_dist.topology.mesh import GroupKind, Mesh
from moe_dist.topology.placement import ExpertPlacement


@dataclass(frozen=True)
class LayerContext:
    """What every MoE layer of a model shares: where it is, and where it keeps account."""

    mesh: Mesh
    placement: ExpertPlacement | None
    balance: BalanceState
    ledger: TrafficLedger
    seed: int


class ClusterBase(nn.Module):
    """What the experts of a cluster share."""

    def __init__(self, layer: int, cluster: int, model: ModelConfig, moe: MoEConfig, seed: int) -> None:
        super().__init__()
        draw = generator(seed, layer, "base", SHARED if moe.shared_init else cluster)
        w_in, w_out = init_base(model.hidden_size, moe.expert_hidden, model.init_std, model.output_init_std, draw)
        self.w_in_DH = nn.Parameter(w_in)
        self.w_out_FD = nn.Parameter(w_out)
        mark(self, ParameterClass.BASE)


class Router(nn.Module):
    """The experts' embeddings, one row an expert by its number, the same on all ranks (dense class).

    A row belongs to its expert wherever that lives: an expert that changes its cluster takes its row into the new
    cluster's prototype.
    """

    def __init__(self, layer: int, experts: int, model: ModelConfig, seed: int) -> None:
        super().__init__()
        rows = [torch.randn(model.hidden_size, generator=generator(seed, layer, "router", e)) for e in range(experts)]
        self.weight_ED = nn.Parameter(torch.stack(rows) * model.init_std)

    def cluster_logits(self, x_TD: Tensor, member_GN: Tensor) -> Tensor:
        """Stage one's scores, [T, G]."""
        return router_logits(x_TD, cluster_prototypes(self.weight_ED, member_GN))

    def expert_logits(self, x_RD: Tensor, member_N: Tensor) -> Tensor:
        """Stage two's scores of the experts of one cluster, [R, N]."""
        return router_logits(x_RD, self.weight_ED[member_N])


class Residuals(nn.Module):
    """The low-rank factors and vectors of the experts of a cluster that this shard holds, by slot."""

    def __init__(self, layer: int, experts: tuple[int, ...], model: ModelConfig, moe: MoEConfig, seed: int) -> None:
        super().__init__()
        shape = (model.hidden_size, moe.expert_hidden, moe.rank, moe.expert_vectors)
        drawn = [init_residual(*shape, generator(seed, layer, "residual", expert)) for expert in experts]

        def stacked(name: str) -> nn.Parameter | None:
            values = [getattr(residual, name) for residual in drawn]
            return None if values[0] is None else nn.Parameter(torch.stack(values))

        self.in_u_NDR = stacked("in_u_DR")
        self.in_v_NRH = stacked("in_v_RH")
        self.out_u_NFR = stacked("out_u_FR")
        self.out_v_NRD = stacked("out_v_RD")
        self.hidden_gate_NF = stacked("hidden_gate_F")
        self.hidden_bias_NH = stacked("hidden_bias_H")
        self.output_bias_ND = stacked("output_bias_D")
        mark(self, ParameterClass.EXPERT)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the names that `ClusterWeights` gives them."""
        return dict(self.named_parameters())


class ClusteredExperts(nn.Module):
    """The part of one cluster that this rank holds."""

    def __init__(self, layer: int, cluster: int, model: ModelConfig, moe: MoEConfig, context: LayerContext) -> None:
        super().__init__()
        placement, shard = context.placement, context.mesh.at.shard
        assert placement is not None
        self.form = moe.form
        self.base = ClusterBase(layer, cluster, model, moe, context.seed)
        self.residuals = Residuals(layer, placement.experts_of(cluster, shard), model, moe, context.seed)

    def weights(self) -> ClusterWeights:
        """The tensors in the form that the computation takes."""
        return ClusterWeights(self.base.w_in_DH, self.base.w_out_FD, **self.residuals.tensors())

    def forward(self, x_AD: Tensor, slot_AK: Tensor, gate_AK: Tensor) -> Tensor:
        return clustered_experts(x_AD, slot_AK, gate_AK, self.weights(), self.form)


class ClusteredMoE(nn.Module):
    """Feed-forward layer of clustered experts; takes and returns [..., D]."""

    def __init__(
        self, layer: int, model: ModelConfig, moe: MoEConfig, context: LayerContext, loss_scale: float = 1.0
    ) -> None:
        super().__init__()
        if context.placement is None:
            raise ValueError("clustered experts need a placement")
        self.layer, self.moe, self.placement, self.balance = layer, moe, context.placement, context.balance
        self.loss_scale = loss_scale
        wire_dtype = getattr(torch, moe.wire_dtype)
        self.local_clusters = self.placement.clusters_of_block(context.mesh.at.cluster)
        self.router = Router(layer, moe.experts, model, context.seed)
        self.clusters = nn.ModuleList(
            ClusteredExperts(layer, cluster, model, moe, context) for cluster in self.local_clusters
        )
        one = Channel(context.mesh.group(GroupKind.STAGE_ONE), context.ledger, layer, Stage.ONE)
        two = Channel(context.mesh.group(GroupKind.CLUSTER), context.ledger, layer, Stage.TWO)
        self.stage_one = StageOne(one, self.placement, wire_dtype)
        self.stage_two = StageTwo(two, self.placement, wire_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        x_TD = hidden.flatten(0, -2)
        member_GN = torch.tensor(self.placement.members, device=x_TD.device)
        loss_scale = self.loss_scale / max(1, len(x_TD))
        logits_TG = self.router.cluster_logits(x_TD, member_GN)
        cluster_TM = choose_clusters(logits_TG, self.balance.cluster_bias_LG[self.layer], self.moe.top_clusters)
        compute = partial(self._run_cluster, member_GN, loss_scale)
        y_TD = self._run_stage_one(x_TD, logits_TG, cluster_TM, compute) * self.moe.gate_scale
        y_TD = attach_router_losses(y_TD, logits_TG, cluster_TM, self.moe, loss_scale)
        return y_TD.view_as(hidden)

    def _run_stage_one(self, x_TD: Tensor, logits_TG: Tensor, cluster_TM: Tensor, compute: ClusterFunction) -> Tensor:
        keep_TM = self._clusters_within_capacity(cluster_TM)
        if self.moe.top_clusters > 1:
            kept_TM = torch.ones_like(cluster_TM, dtype=torch.bool) if keep_TM is None else keep_TM
            chosen_TG = torch.zeros_like(logits_TG, dtype=torch.bool).scatter_(1, cluster_TM, kept_TM)
            return self.stage_one.run_several(x_TD, logits_TG, chosen_TG, compute)
        gate_T1 = single_cluster_gate(logits_TG, cluster_TM).to(x_TD.dtype)
        if keep_TM is None:
            return self.stage_one.run_single(x_TD, cluster_TM[:, 0], compute) * gate_T1
        kept_R = keep_TM[:, 0].nonzero()[:, 0]
        y_RD = self.stage_one.run_single(x_TD[kept_R], cluster_TM[kept_R, 0], compute)
        return torch.zeros_like(x_TD).index_copy(0, kept_R, y_RD) * gate_T1

    def _clusters_within_capacity(self, cluster_TM: Tensor) -> Tensor | None:
        if self.moe.capacity_factor is None:
            return None
        capacity = capacity_of(cluster_TM.numel(), self.moe.clusters, self.moe.capacity_factor)
        keep_C = within_capacity(cluster_TM.flatten(), self.moe.clusters, capacity)
        self.balance.drop(self.layer, keep_C, self.moe.top_k)
        return keep_C.view_as(cluster_TM)

    def _run_cluster(self, member_GN: Tensor, loss_scale: float, local: int, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses the experts of the rows of one local cluster and computes them."""
        member_N = member_GN[self.local_clusters[local]]
        logits_RN = self.router.expert_logits(x_RD, member_N)
        bias_N = self.balance.expert_bias_LE[self.layer][member_N]
        choice = choose_experts(logits_RN, bias_N, self.moe.top_k, only_gate=self.moe.top_clusters == 1)
        self.balance.count(self.layer, member_N[choice.slot_RK.flatten()])
        gate_RK = attach_router_losses(choice.gate_RK, logits_RN, choice.slot_RK, self.moe, loss_scale)
        slot_RK, gate_RK = self._slots_within_capacity(choice.slot_RK, gate_RK)
        experts = self.clusters[local]
        assert isinstance(experts, ClusteredExperts)
        return self.stage_two.run(x_RD, slot_RK, gate_RK, experts), choice.log_mass_R

    def _slots_within_capacity(self, slot_RK: Tensor, gate_RK: Tensor) -> tuple[Tensor, Tensor]:
        if self.moe.capacity_factor is None:
            return slot_RK, gate_RK
        slots = self.placement.slots
        capacity = capacity_of(slot_RK.numel(), slots, self.moe.capacity_factor)
        keep_C = within_capacity(slot_RK.flatten(), slots, capacity)
        self.balance.drop(self.layer, keep_C)
        keep_RK = keep_C.view_as(slot_RK)
        return slot_RK.masked_fill(~keep_RK, ABSENT), gate_RK * keep_RK
