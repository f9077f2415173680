"""Standard MoE layer: top-k routing over all experts, expert parallelism, dropless unless a capacity is set.

Shapes: T tokens, D hidden, E experts, K chosen experts.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.compression import init_base
from moe_dist.config import MoEConfig
from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.flat_dispatcher import FlatDispatcher
from moe_dist.dispatch.traffic_ledger import Stage, TrafficLedger
from moe_dist.dispatch.wire_format import wire_format_of
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.moe.attached_loss import attach_router_losses
from moe_dist.moe.capacity import capacity_of, within_capacity
from moe_dist.moe.dense_feed_forward import SharedExpert
from moe_dist.moe.init_generator import SHARED, generator
from moe_dist.moe.layer_context import LayerContext, LayerSizes
from moe_dist.moe.layer_state import load_routing_state, save_routing_state
from moe_dist.moe.moe_layer import MoELayer
from moe_dist.moe.parameter_class import ParameterClass, mark
from moe_dist.moe.router import Router
from moe_dist.moe.scoring import Scoring
from moe_dist.moe.standalone import standalone
from moe_dist.moe.standard_experts import StandardExperts
from moe_dist.moe.topk_routing import FlatChoice, choose_flat


class StandardMoE(MoELayer):
    """Feed-forward layer of standard experts; maps [..., D] to [..., D]. Collective over the ranks of its mesh."""

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
        """Create a layer for use in any model; arguments and errors are those of `ClusteredMoE`."""
        sizes, context = standalone("standard", hidden_size, moe, mesh, seed, init_std, output_init_std, ledger)
        self._build(0, sizes, moe, context, 1.0)

    def _build(self, layer: int, sizes: LayerSizes, moe: MoEConfig, context: LayerContext, loss_scale: float) -> None:
        super()._build(layer, sizes, moe, context, loss_scale)
        group = context.mesh.group(GroupKind.EXPERT_PARALLEL)
        self.router = Router.of_layer(layer, moe.experts, sizes, context.seed)
        local = moe.experts // group.size
        self.first_expert = first = context.mesh.index_in(GroupKind.EXPERT_PARALLEL) * local

        def init(index: int) -> tuple[Tensor, Tensor]:
            draw = generator(context.seed, layer, "expert", SHARED if moe.shared_init else first + index)
            return init_base(sizes.hidden_size, moe.expert_hidden, sizes.init_std, sizes.output_init_std, draw)

        memory = context.memory
        adopt = None if memory is None else partial(memory.adopt, layer)
        self.experts = StandardExperts(local, init, adopt=adopt)
        mark(self.experts, ParameterClass.EXPERT)
        self.shared = SharedExpert.of_layer(layer, sizes, moe, context.seed)
        hidden_format = wire_format_of(getattr(torch, moe.wire_dtype))
        self.dispatcher = FlatDispatcher(AllToAll(group, context.ledger, layer, Stage.FLAT, hidden_format), moe.experts)
        self.register_state_dict_post_hook(save_routing_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(load_routing_state)  # type: ignore[no-untyped-call]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's addition to the residual stream, in the shape of `hidden`; collective."""
        x_TD = hidden.flatten(0, -2)
        logits_TE = self.router.logits(x_TD)
        choice, keep_C = self.route(logits_TE)
        rows, metadata = self.dispatcher.dispatch(x_TD, choice.expert_TK, self.moe.gate_scale * choice.gate_TK, keep_C)
        y_AD = self.experts(*rows)
        y_TD = self.dispatcher.combine(y_AD, metadata)
        scale = self.loss_scale / max(1, len(x_TD))
        y_TD = attach_router_losses(y_TD, logits_TE, choice.expert_TK, self.balance, self.moe.z_loss_weight, scale)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(hidden)

    def route(self, logits_TE: Tensor) -> tuple[FlatChoice, Tensor | None]:
        """Choose the experts of each token; return the choice and keep_C, the copies within the capacity."""
        bias_E = self.balance.expert_bias_LE[self.layer]
        choice = choose_flat(logits_TE, bias_E, self.moe.top_k, self.moe.normalize_gates, Scoring.of(self.moe))
        expert_C = choice.expert_TK.flatten()
        self.balance.count(self.layer, expert_C)
        if self.moe.capacity_factor is None:
            return choice, None
        capacity = capacity_of(expert_C.numel(), self.moe.experts, self.moe.capacity_factor)
        keep_C = within_capacity(expert_C, self.moe.experts, capacity)
        self.balance.drop(self.layer, keep_C)
        return choice, keep_C

    def _apply(self, fn: Any, recurse: bool = True) -> "StandardMoE":
        """Move the balance state with the layer if it is not shared with other layers."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if len(self.balance.count_LE) == 1:
            self.balance.to(self.router.weight_ED.device)
        return self
