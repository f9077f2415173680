"""Assignment of functions to parts of a step; they are wrapped from outside, so that training itself pays nothing."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from moe_dist.benchmarks.collective_timer import CollectiveTimer, StepPhase, timing_collectives
from moe_dist.benchmarks.step.profiler import StepPart, StepProfiler
from moe_dist.dispatch.all_to_all import AllToAll, PendingAllToAll
from moe_dist.dispatch.cluster_dispatcher import StageOne
from moe_dist.dispatch.flat_dispatcher import FlatDispatch
from moe_dist.dispatch.shard_dispatcher import StageTwo
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.moe import clustered_moe as clustered_layer
from moe_dist.moe import standard_moe as standard_layer
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.dense_feed_forward import SwiGLU
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.router import Router
from moe_dist.moe.routing_statistics import RoutingStatistics
from moe_dist.moe.standard_experts import StandardExperts
from moe_dist.training.load_metrics import LoadRecord
from moe_dist.training.trainer import Trainer

PARTS: dict[StepPart, list[tuple[Any, str]]] = {
    StepPart.ROUTING: [
        (Router, "cluster_logits"),
        (Router, "local_embeddings"),
        *((clustered_layer, name) for name in ("choose_clusters", "choose_experts", "router_logits", "advantage_gate")),
        (clustered_layer, "attach_router_losses"),
        *((standard_layer, name) for name in ("router_logits", "choose_flat", "attach_router_losses")),
        (BalanceState, "update"),
    ],
    StepPart.PERMUTE: [(StageOne, "run_single"), (StageOne, "run_several"), (StageTwo, "run"), (FlatDispatch, "run")],
    StepPart.ALL_TO_ALL: [(AllToAll, "begin"), (PendingAllToAll, "finish"), (AllToAll, "exchange_counts")],
    StepPart.EXPERTS: [(ClusteredExperts, "forward"), (StandardExperts, "forward"), (SwiGLU, "forward")],
    StepPart.COUNTERS: [
        (BalanceState, "count"),
        (BalanceState, "drop"),
        (TrafficLedger, "record"),
        (RoutingStatistics, "give"),
        (RoutingStatistics, "choose_clusters"),
    ],
    StepPart.METRICS: [(LoadRecord, "add"), (Trainer, "_figures"), (Trainer, "_record_loads")],
    StepPart.OPTIMIZER: [(DeepSpeedEngine, "update")],
}
"""Functions of each part. The innermost function that runs decides: experts inside a dispatch are experts."""


class _Timed(CollectiveTimer):
    """Timer that reports collectives to the step profiler: the wait for all ranks, then the exchange."""

    def __init__(self, clock: StepProfiler) -> None:
        super().__init__()
        self.clock = clock

    def _run(self, part: StepPhase, function: Any, given: inspect.BoundArguments) -> None:
        arguments = {**given.arguments, "async_op": False}
        group = arguments.get("group")
        around = self.clock.enter(StepPart.WAITING)
        if dist.get_world_size(group) > 1:
            dist.barrier(group=group)
        self.clock.enter(StepPart(part.value))
        function(**arguments)
        self.clock.enter(around)


@contextmanager
def step_clock() -> Iterator[StepProfiler]:
    """Yield a profiler of every function in `PARTS` and of every collective; enter before DeepSpeed starts."""
    clock = StepProfiler()
    before = [(owner, name, getattr(owner, name)) for members in PARTS.values() for owner, name in members]
    for part, members in PARTS.items():
        for owner, name in members:
            setattr(owner, name, clock.wrap(part, getattr(owner, name)))
    try:
        with timing_collectives(_Timed(clock)) as watch:
            clock.on_switch = lambda running: setattr(watch, "active", running)
            yield clock
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def clock_attention(clock: StepProfiler, attention: Any) -> None:
    """Count the projections and rotary positions of a layer as attention too."""
    attention.forward = clock.wrap(StepPart.ATTENTION, attention.forward)
