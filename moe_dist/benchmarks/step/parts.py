"""Assignment of functions to parts of a step; they are wrapped from outside, so that training itself pays nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_dist.benchmarks.collective_timer import CollectiveTimer, StepPhase, timing_collectives
from moe_dist.benchmarks.step.profiler import StepPart, StepProfiler
from moe_dist.data import PrefetchingLoader
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
    StepPart.DATA: [(PrefetchingLoader, "batch")],
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
        (RoutingStatistics, "record_rows"),
        (RoutingStatistics, "record_clusters"),
    ],
    StepPart.METRICS: [(MetricsLogger, "after_update"), (MetricsLogger, "after_step")],
    StepPart.OPTIMIZER: [(DeepSpeedEngine, "update")],
}
"""Functions of each part. The innermost function that runs decides: experts inside a dispatch are experts."""


class _ProfiledCollectives(CollectiveTimer):
    """Timer that reports collectives to the step profiler: the wait for all ranks, then the exchange."""

    def __init__(self, profiler: StepProfiler) -> None:
        super().__init__()
        self.profiler = profiler

    @contextmanager
    def phase(self, part: StepPhase) -> Iterator[None]:
        around = self.profiler.enter(StepPart(part.value))
        try:
            yield
        finally:
            self.profiler.enter(around)


@contextmanager
def step_profiler() -> Iterator[StepProfiler]:
    """Yield a profiler of every function in `PARTS` and of every collective; enter before DeepSpeed starts."""
    profiler = StepProfiler()
    before = [(owner, name, getattr(owner, name)) for members in PARTS.values() for owner, name in members]
    for part, members in PARTS.items():
        for owner, name in members:
            setattr(owner, name, profiler.wrap(part, getattr(owner, name)))
    try:
        with timing_collectives(_ProfiledCollectives(profiler)) as timer:
            profiler.on_switch = lambda running: setattr(timer, "active", running)
            yield profiler
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def profile_attention(profiler: StepProfiler, attention: Any) -> None:
    """Count the projections and rotary positions of a layer as attention too."""
    attention.forward = profiler.wrap(StepPart.ATTENTION, attention.forward)
