"""Planner: predicts memory and step time of all possible layouts and recommends the best one."""

from dataclasses import dataclass, replace

import numpy as np

from moe_dist.config import RunConfig, WorldShape
from moe_dist.dispatch.layout_advice import sends_little
from moe_dist.errors import ConfigError
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.layout_search import LayoutOption, layouts, settled
from moe_dist.simulator.memory import Memory, memory_of_rank
from moe_dist.simulator.popularity import Floats, zipf
from moe_dist.simulator.step_time import KnownLayers, Scenario, StepTime, step_time
from moe_dist.simulator.strategies import Strategy

MOST_REPLICAS = 16  # drawn for a plan: enough to include a slow one
GIB = 2.0**30


@dataclass(frozen=True)
class Option:
    """Layout with its predictions; `time` is None if it does not fit."""

    layout: LayoutOption
    memory: Memory
    fits: bool
    time: StepTime | None = None


@dataclass(frozen=True)
class PlannerResult:
    """All candidates, the fastest first, those that do not fit last."""

    options: tuple[Option, ...]
    limit: float
    reason: str

    @property
    def best(self) -> Option:
        """Return the fastest layout that fits."""
        return self.options[0]


def plan(config: RunConfig, fabric: Fabric, vocabulary: int, skew: float) -> PlannerResult:
    """Predict every possible layout.

    Args:
        skew: skew of the experts' popularity (`popularity.zipf`).

    Raises:
        ConfigError: the batch does not divide over the ranks, or nothing fits; the line names a size that would.
    """
    limit = fabric.device.memory - fabric.device.reserved
    possible = layouts(config, fabric.ranks, vocabulary, fabric.devices_per_node)
    options = [_remembered(config, layout, vocabulary, limit) for layout in possible]
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise ConfigError(_refusal(config, fabric, vocabulary, options, limit))
    fitting = [option for option in fitting if sends_little(config, option.layout.shape)] or fitting
    popularity_LE = zipf(config.moe.experts, skew, 2, np.random.default_rng(0))
    known: KnownLayers = {}
    timed = [_timed(config, option, fabric, vocabulary, popularity_LE, known) for option in _without_waste(fitting)]
    timed.sort(key=lambda option: (option.time.seconds if option.time else 0.0, option.memory.total))
    too_large = sorted((option for option in options if not option.fits), key=lambda option: option.memory.total)
    return PlannerResult((*timed, *too_large), limit, _reason(timed, limit))


def _remembered(config: RunConfig, layout: LayoutOption, vocabulary: int, limit: float) -> Option:
    memory = memory_of_rank(settled(config, layout), layout.shape, layout.batch, vocabulary)
    return Option(layout, memory, memory.total <= limit)


def _without_waste(fitting: list[Option]) -> list[Option]:
    """Return for each shape and recomputation the lowest ZeRO stage that fits, with the largest micro-batch.

    A larger micro-batch means fewer exchanges, and a higher stage saves nothing but memory. With pipeline stages a
    larger micro-batch also means a longer bubble: all sizes are kept.
    """
    kept: dict[tuple[WorldShape, bool, int], Option] = {}
    for option in fitting:
        layout = option.layout
        micro = layout.batch.micro if layout.shape.pipeline > 1 else 0
        key, rank = (layout.shape, layout.checkpointing, micro), (-layout.batch.micro, layout.zero_stage)
        held = kept.get(key)
        if held is None or rank < (-held.layout.batch.micro, held.layout.zero_stage):
            kept[key] = option
    return list(kept.values())


def _timed(
    config: RunConfig, option: Option, fabric: Fabric, vocabulary: int, popularity_LE: Floats, known: KnownLayers
) -> Option:
    layout = option.layout
    strategy = Strategy.TWO_STAGE if config.moe.layer_kind.clustered else Strategy.FLAT
    shape = layout.shape
    time = step_time(
        settled(config, layout),
        shape,
        layout.batch,
        vocabulary,
        fabric,
        popularity_LE,
        Scenario(strategy, drawn_replicas=MOST_REPLICAS),
        known,
    )
    return replace(option, time=time)


def _reason(timed: list[Option], limit: float) -> str:
    best = timed[0]
    assert best.time is not None
    parts = sorted(best.time.parts.items(), key=lambda part: -part[1])[:2]
    spent = " and ".join(f"{seconds / best.time.seconds:.0%} in {name}" for name, seconds in parts)
    text = f"the fastest of {len(timed)} that fit, {(limit - best.memory.total) / GIB:.1f} GiB to spare; {spent}"
    crossing = best.time.inter_node_bytes_per_token_layer / max(1.0, best.time.bytes_per_token_layer)
    text += f"; {crossing:.0%} of the all-to-all leaves a node"
    other = next((option for option in timed[1:] if option.layout.shape != best.layout.shape), None)
    if other is not None and other.time is not None:
        slower = other.time.seconds / best.time.seconds - 1
        text += f"; the next other shape ({other.layout.shape}) would take {slower:.1%} longer"
    return text


def _refusal(config: RunConfig, fabric: Fabric, vocabulary: int, options: list[Option], limit: float) -> str:
    least = min(options, key=lambda option: option.memory.total)
    text = (
        f"nothing fits {fabric.ranks} GPUs of {fabric.device.name} with {limit / GIB:.1f} GiB each: the least is "
        f"{least.memory.total / GIB:.1f} GiB, {least.layout.overrides}"
    )
    for factor in (2, 4, 8, 16, 32):
        ranks = fabric.ranks * factor
        larger = config.model_copy(
            update={"train": config.train.model_copy(update={"global_batch_size": ranks, "micro_batch_size": None})}
        )
        possible = layouts(larger, ranks, vocabulary, fabric.devices_per_node)
        fit = [_remembered(larger, layout, vocabulary, limit) for layout in possible]
        if found := next((option for option in fit if option.fits), None):
            return f"{text}; {fabric.nodes * factor} nodes would do, {found.layout.overrides}"
    return f"{text}; more of these GPUs alone would not help: use a smaller model, sequence or GPUs with more memory"
