"""Layers that benchmarks compare, behind one interface: ours, those of other libraries, and the dense floor."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_dist.benchmarks.baselines.deepspeed_moe import DeepSpeedMoE
from moe_dist.benchmarks.baselines.megatron_moe import MegatronMoE, stand_ins
from moe_dist.benchmarks.layer.recorded_routing import RoutingRecord
from moe_dist.benchmarks.layer.spec import CLUSTERED, LATENT, LayerShape
from moe_dist.config import RunConfig, resolve_world
from moe_dist.config.layer_kinds import PROJECTIONS
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.dispatch.traffic_model import vector_bytes
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.kernels.backend_choice import BackendShape, measure_backends
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.dense_feed_forward import SwiGLU
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.layer_kinds import LAYER_KINDS
from moe_dist.moe.load_balancing import BalanceState

DENSE, STANDARD = "dense", "standard"
CAPACITY_FACTOR = 1.25
"""Capacity factor of DeepSpeed's layer; dropless it is slower still, since it pads to the fullest expert."""


@dataclass(frozen=True)
class Contender:
    """One layer that is compared: [T, D] -> [T, D].

    Attributes:
        ledger: traffic ledger of our own layers; None for others.
        vector_bytes: bytes of one hidden vector on the wire.
        setting: context manager of forward and backward passes.
        router: weight of its router, [E, D]; None: it has none.
        config: its configuration.
        x_TD: tokens of its own, of recorded routing; None: those that all contenders get.
    """

    module: nn.Module
    vector_bytes: int
    ledger: TrafficLedger | None = None
    setting: Callable[[], AbstractContextManager[None]] = nullcontext
    router: nn.Parameter | None = None
    config: RunConfig | None = None
    x_TD: Tensor | None = None

    def replay(self, record: RoutingRecord, tokens: int, process: RankInfo) -> "Contender":
        """Return the contender with a router and tokens that make the recorded choices.

        Raises:
            ConfigError: the record is too short, or there are more experts than dimensions.
        """
        assert self.router is not None
        assert self.config is not None
        hidden = self.config.model.hidden_size
        x_TD, weight_ED = record.inputs(tokens, hidden, process.rank, process.ranks, self.config.seed)
        with torch.no_grad():
            self.router.copy_(weight_ED)
        x_TD = x_TD.to(process.device, getattr(torch, self.config.train.precision)).requires_grad_()
        return replace(self, x_TD=x_TD)

    def run(self, x_TD: Tensor, d_y_TD: Tensor) -> Tensor:
        """Run forward and backward; gradients of the input and of all weights are recomputed."""
        with self.setting():
            y_TD: Tensor = self.module(x_TD if self.x_TD is None else self.x_TD)
            y_TD.backward(d_y_TD)
        return y_TD

    def forget(self) -> None:
        """Drop the gradients."""
        self.module.zero_grad(set_to_none=True)
        if self.x_TD is not None:
            self.x_TD.grad = None


def build(name: str, shape: LayerShape, dtype: str, top_k: int, process: RankInfo, mesh: Mesh) -> Contender:
    """Return the contender of that name; collective for other libraries, which form process groups."""
    clustered = name.startswith("clustered")
    kind = "clustered" if clustered else DENSE if name == DENSE else STANDARD
    config = shape.config(kind, dtype, top_k, CLUSTERED.get(name, 1))
    vector = vector_bytes(shape.hidden, config.moe.wire_dtype)
    if name == "deepspeed":
        contender = Contender(DeepSpeedMoE(config, process.ranks, CAPACITY_FACTOR), vector)
    elif name == "megatron":
        contender = Contender(MegatronMoE(config, process.ranks), vector, setting=stand_ins)
    elif name == LATENT:
        width = latent_width(shape.config("clustered", dtype, top_k))
        contender = Contender(
            MegatronMoE(config, process.ranks, width), vector_bytes(width, config.moe.wire_dtype), setting=stand_ins
        )
    elif name == DENSE:
        contender = Contender(SwiGLU(0, config.moe.dense_width, config.model, config.seed), vector)
    else:
        ledger = TrafficLedger(Links.alone() if process.ranks == 1 else Links.discover(process.device))
        layer = _ours(config, process, mesh, ledger)
        if isinstance(layer, ClusteredMoE) and config.moe.backend == "auto":
            work = BackendShape.of(config.moe, shape.hidden, dtype, shape.tokens, process.ranks)
            layer.set_backend(measure_backends(work, process.device).fastest)
        contender = Contender(layer, vector, ledger)
    contender.module.to(process.device, getattr(torch, dtype))
    return replace(contender, router=_router_of(contender.module), config=config)


def latent_width(clustered: RunConfig) -> int:
    """Return the width of LatentMoE's experts with which they and both projections have a clustered layer's parameters.

    It is rounded down to a multiple of 8.
    """
    moe, hidden = clustered.moe, clustered.model.hidden_size
    held = moe.layer_kind.parameters(hidden, moe, 1, 1)
    a_column = PROJECTIONS * moe.experts * moe.expert_hidden + 2 * hidden
    return max(8, (held.base + held.expert) // a_column // 8 * 8)


def _router_of(module: nn.Module) -> nn.Parameter | None:
    """Return the weight of a layer's linear router, [E, D]."""
    places = ("router.weight_ED", "layer.deepspeed_moe.gate.wg.weight", "layer.router.weight")
    parameters = dict(module.named_parameters())
    return next((parameters[place] for place in places if place in parameters), None)


def _ours(config: RunConfig, process: RankInfo, mesh: Mesh, ledger: TrafficLedger) -> nn.Module:
    moe = config.moe
    clustered = moe.layer_kind.clustered
    placements = [ExpertPlacement.contiguous(moe.experts, moe.clusters, mesh.shape)] if clustered else []
    context = LayerContext(mesh, placements, BalanceState.create(1, moe, process.device), ledger, config.seed)
    return LAYER_KINDS[moe.kind](0, config.model, moe, context, 1.0)


def mesh_for(shape: LayerShape, process: RankInfo) -> Mesh:
    """Return a mesh that divides all experts over all ranks once; collective."""
    if process.ranks == 1:
        return Mesh.alone()
    return Mesh.create(resolve_world(shape.config("clustered", "float32", 1), process.ranks), process.timeout)
