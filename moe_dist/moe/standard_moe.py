"""The standard MoE layer, as strong as we can make it: dropless top-k over all experts, expert parallelism.

Shapes: T tokens, D hidden, E experts, K chosen experts.
"""

import torch
from torch import Tensor, nn

from moe_dist.compression import init_base
from moe_dist.config import ModelConfig, MoEConfig
from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.flat_dispatcher import FlatDispatch
from moe_dist.dispatch.traffic_ledger import Stage
from moe_dist.distributed.mesh import GroupKind
from moe_dist.moe.attached_loss import attach_router_losses
from moe_dist.moe.capacity import capacity_of, within_capacity
from moe_dist.moe.dense_feed_forward import SwiGLU
from moe_dist.moe.init_generator import SHARED, generator
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.parameter_class import ParameterClass, mark
from moe_dist.moe.standard_experts import StandardExperts
from moe_dist.moe.topk_routing import choose_flat
from moe_dist.moe.two_stage_routing import router_logits


class StandardMoE(nn.Module):
    """Feed-forward layer of standard experts; takes and returns [..., D]."""

    def __init__(
        self, layer: int, model: ModelConfig, moe: MoEConfig, context: LayerContext, loss_scale: float
    ) -> None:
        super().__init__()
        group = context.mesh.group(GroupKind.EXPERT_PARALLEL)
        self.layer, self.moe, self.balance, self.loss_scale = layer, moe, context.balance, loss_scale
        self.router = nn.Linear(model.hidden_size, moe.experts, bias=False)
        draw = generator(context.seed, layer, "router", SHARED)
        nn.init.normal_(self.router.weight, std=model.init_std, generator=draw)
        local = moe.experts // group.size
        self.first_expert = first = group.ranks.index(context.mesh.rank) * local

        def init(index: int) -> tuple[Tensor, Tensor]:
            draw = generator(context.seed, layer, "expert", SHARED if moe.shared_init else first + index)
            return init_base(model.hidden_size, moe.expert_hidden, model.init_std, model.output_init_std, draw)

        self.experts = StandardExperts(local, init)
        mark(self.experts, ParameterClass.EXPERT)
        width = moe.shared_expert_hidden
        self.shared = SwiGLU(layer, width, model, context.seed, "shared expert") if width else None
        channel = AllToAll(group, context.ledger, layer, Stage.FLAT)
        self.dispatch = FlatDispatch(channel, moe.experts, getattr(torch, moe.wire_dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Takes and returns [..., D]; collective over the expert-parallel group."""
        x_TD = hidden.flatten(0, -2)
        logits_TE = router_logits(x_TD, self.router.weight)
        choice = choose_flat(logits_TE, self.balance.expert_bias_LE[self.layer], self.moe.top_k)
        expert_C = choice.expert_TK.flatten()
        self.balance.count(self.layer, expert_C)
        keep_C = self._within_capacity(expert_C)
        gate_TK = self.moe.gate_scale * choice.gate_TK
        y_TD = self.dispatch.run(x_TD, choice.expert_TK, gate_TK, self.experts, keep_C)
        scale = self.loss_scale / max(1, len(x_TD))
        y_TD = attach_router_losses(y_TD, logits_TE, choice.expert_TK, self.moe, scale, self.balance)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(hidden)

    def _within_capacity(self, expert_C: Tensor) -> Tensor | None:
        if self.moe.capacity_factor is None:
            return None
        capacity = capacity_of(expert_C.numel(), self.moe.experts, self.moe.capacity_factor)
        keep_C = within_capacity(expert_C, self.moe.experts, capacity)
        self.balance.drop(self.layer, keep_C)
        return keep_C
