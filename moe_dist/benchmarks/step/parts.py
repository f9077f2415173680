"""Which functions make up which part of a step: they are wrapped from outside, so that training itself pays nothing."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from moe_dist.benchmarks.collective_timer import CollectiveTimer, StepPhase, timing_collectives
from moe_dist.benchmarks.step.profiler import StepPart, StepProfiler
from moe_dist.dispatch import top1_dispatcher
from moe_dist.dispatch.all_to_all import AllToAll, PendingAllToAll
from moe_dist.dispatch.flat_dispatcher import FlatDispatcher
from moe_dist.dispatch.shard_dispatcher import ShardDispatcher
from moe_dist.dispatch.top1_dispatcher import Top1Dispatcher
from moe_dist.dispatch.topm_dispatcher import TopMDispatcher
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.moe import clustered_moe, stage_two, standard_moe
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.dense_feed_forward import SwiGLU
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.router import Router
from moe_dist.moe.routing_statistics import RoutingStatistics
from moe_dist.moe.standard_experts import StandardExperts
from moe_dist.training.metrics_logger import MetricsLogger

DISPATCHERS = (Top1Dispatcher, TopMDispatcher, ShardDispatcher, FlatDispatcher)
PARTS: dict[StepPart, list[tuple[Any, str]]] = {
    StepPart.ROUTING: [
        (Router, "cluster_logits"),
        (Router, "local_embeddings"),
        (Router, "logits"),
        (top1_dispatcher, "advantage_gate"),
        *((clustered_moe, name) for name in ("choose_clusters", "attach_router_losses")),
        *((stage_two, name) for name in ("choose_experts", "router_logits", "attach_router_losses")),
        *((standard_moe, name) for name in ("choose_flat", "attach_router_losses")),
        (BalanceState, "update"),
    ],
    StepPart.PERMUTE: [(dispatcher, name) for dispatcher in DISPATCHERS for name in ("dispatch", "combine")],
    StepPart.ALL_TO_ALL: [(AllToAll, "launch"), (PendingAllToAll, "wait"), (AllToAll, "exchange_counts")],
    StepPart.EXPERTS: [(ClusteredExperts, "forward"), (StandardExperts, "forward"), (SwiGLU, "forward")],
    StepPart.COUNTERS: [
        (BalanceState, "count"),
        (BalanceState, "drop"),
        (TrafficLedger, "record"),
        (RoutingStatistics, "give"),
        (RoutingStatistics, "choose_clusters"),
    ],
    StepPart.METRICS: [(MetricsLogger, "after_update"), (MetricsLogger, "after_step")],
    StepPart.OPTIMIZER: [(DeepSpeedEngine, "update")],
}
"""The innermost function that runs decides: experts inside a dispatch are experts."""


class _Timed(CollectiveTimer):
    """Collectives as parts of the step: the time until all ranks have come, then the exchange."""

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
    """A clock to which every part of `PARTS` and every collective reports; entered before DeepSpeed is initialised."""
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
    """Its projections and rotary positions are part of attention too."""
    attention.forward = clock.wrap(StepPart.ATTENTION, attention.forward)
