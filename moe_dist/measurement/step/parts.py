"""Which functions make up which part of a step: they are wrapped from outside, so that training itself pays nothing."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from moe_dist.dispatch.channel import Channel, Pending
from moe_dist.dispatch.flat import FlatDispatch
from moe_dist.dispatch.stage_one import StageOne
from moe_dist.dispatch.stage_two import StageTwo
from moe_dist.dispatch.traffic import TrafficLedger
from moe_dist.engine.engine import Engine
from moe_dist.measurement.collectives import CollectiveWatch, Part, watching
from moe_dist.measurement.step.clock import PartClock, StepPart
from moe_dist.model import clustered_layer, standard_layer
from moe_dist.model.balance_state import BalanceState
from moe_dist.model.clustered_experts import ClusteredExperts
from moe_dist.model.dense_layer import SwiGLU
from moe_dist.model.router import Router
from moe_dist.model.routing_statistics import RoutingStatistics
from moe_dist.model.standard_experts import StandardExperts
from moe_dist.training.loads import LoadRecord
from moe_dist.training.run import TrainingRun

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
    StepPart.ALL_TO_ALL: [(Channel, "begin"), (Pending, "finish"), (Channel, "exchange_counts")],
    StepPart.EXPERTS: [(ClusteredExperts, "forward"), (StandardExperts, "forward"), (SwiGLU, "forward")],
    StepPart.COUNTERS: [
        (BalanceState, "count"),
        (BalanceState, "drop"),
        (TrafficLedger, "record"),
        (RoutingStatistics, "give"),
        (RoutingStatistics, "choose_clusters"),
    ],
    StepPart.METRICS: [(LoadRecord, "add"), (TrainingRun, "_figures"), (TrainingRun, "_record_loads")],
    StepPart.OPTIMIZER: [(Engine, "update")],
}
"""The innermost function that runs decides: experts inside a dispatch are experts."""


class _Timed(CollectiveWatch):
    """Collectives as parts of the step: the time until all ranks have come, then the exchange."""

    def __init__(self, clock: PartClock) -> None:
        super().__init__()
        self.clock = clock

    def _run(self, part: Part, function: Any, given: inspect.BoundArguments) -> None:
        arguments = {**given.arguments, "async_op": False}
        group = arguments.get("group")
        around = self.clock.enter(StepPart.WAITING)
        if dist.get_world_size(group) > 1:
            dist.barrier(group=group)
        self.clock.enter(StepPart(part.value))
        function(**arguments)
        self.clock.enter(around)


@contextmanager
def step_clock() -> Iterator[PartClock]:
    """A clock to which every part of `PARTS` and every collective reports; entered before DeepSpeed is initialised."""
    clock = PartClock()
    before = [(owner, name, getattr(owner, name)) for members in PARTS.values() for owner, name in members]
    for part, members in PARTS.items():
        for owner, name in members:
            setattr(owner, name, clock.wrap(part, getattr(owner, name)))
    try:
        with watching(_Timed(clock)) as watch:
            clock.on_switch = lambda running: setattr(watch, "active", running)
            yield clock
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def clock_attention(clock: PartClock, attention: Any) -> None:
    """Its projections and rotary positions are part of attention too."""
    attention.forward = clock.wrap(StepPart.ATTENTION, attention.forward)
