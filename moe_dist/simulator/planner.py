"""Planner: predicts memory and step time of all possible layouts and recommends the best one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np

from moe_dist.config import BatchShape, RunConfig, WorldShape
from moe_dist.dispatch.layout_advice import sends_little
from moe_dist.errors import ConfigError
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.memory import Memory, memory_of_rank
from moe_dist.simulator.popularity import Floats, zipf
from moe_dist.simulator.step_time import Scenario, StepTime, step_time
from moe_dist.simulator.strategies import Strategy

MOST_REPLICAS = 16  # drawn for a plan: enough to include a slow one
LARGEST_MICRO_BATCH = 1 << 16
"""Largest micro-batch per rank that is considered, sequences; so any global batch size is planned at once."""
GIB = 2.0**30


@dataclass(frozen=True)
class LayoutOption:
    """Layout of a job."""

    shape: WorldShape
    zero_stage: int
    batch: BatchShape
    checkpointing: bool

    @property
    def overrides(self) -> str:
        """Return the layout as overrides for `moe-dist launch`."""
        shape = self.shape
        shard = f"world.shard={shape.shard} " + f"world.shard_mode={_mode(shape)} " * (shape.shard > 1)
        return (
            f"world.data={shape.data} world.cluster={shape.cluster} {shard}"
            f"world.zero_stage={self.zero_stage} train.micro_batch_size={self.batch.micro} "
            f"model.activation_checkpointing={str(self.checkpointing).lower()}"
        )


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
    options = [_remembered(config, layout, vocabulary, limit) for layout in layouts(config, fabric.ranks)]
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise ConfigError(_refusal(config, fabric, vocabulary, options, limit))
    fitting = [option for option in fitting if sends_little(config, option.layout.shape)] or fitting
    popularity_LE = zipf(config.moe.experts, skew, 2, np.random.default_rng(0))
    timed = [_timed(config, option, fabric, vocabulary, popularity_LE) for option in _without_waste(fitting)]
    timed.sort(key=lambda option: (option.time.seconds if option.time else 0.0, option.memory.total))
    too_large = sorted((option for option in options if not option.fits), key=lambda option: option.memory.total)
    return PlannerResult((*timed, *too_large), limit, _reason(timed, limit))


def layouts(config: RunConfig, ranks: int) -> Iterator[LayoutOption]:
    """Return shapes that divide experts and ranks, with every ZeRO stage, micro-batch and choice of recomputation.

    Raises:
        ConfigError: the batch does not divide over the ranks.
    """
    batch = config.train.global_batch_size
    world = config.world
    parts = world.tensor * world.context * world.pipeline
    if ranks % parts:
        raise ConfigError(f"{ranks} GPUs are not divisible by world.tensor x world.context x world.pipeline = {parts}")
    groups, by = ranks // parts, "" if parts == 1 else f" / {parts} that share a sequence"
    if batch % groups:
        nearest = max(1, round(batch / groups)) * groups
        raise ConfigError(
            f"train.global_batch_size={batch} is not divisible by {ranks} GPUs{by}: use {nearest}, for example"
        )
    for shape in _shapes(config, ranks):
        for zero_stage in (0, 1, 2):
            for micro in _divisors(batch // groups):
                accumulation = batch // groups // micro
                if shape.chunks > 1 and accumulation % shape.pipeline:
                    continue
                for checkpointing in (False, True):
                    yield LayoutOption(shape, zero_stage, BatchShape(micro, accumulation), checkpointing)


def _shapes(config: RunConfig, ranks: int) -> Iterator[WorldShape]:
    clusters, shards = config.moe.layer_kind.units(config.moe)
    sliced = config.moe.layer_kind.clustered and config.world.shard_mode == "slice"
    if sliced:
        shards = config.moe.expert_hidden
    for cluster in _divisors(clusters, ranks):
        for shard in _divisors(shards, ranks):
            world = config.world
            shape = WorldShape(
                ranks // (cluster * shard * world.pipeline),
                cluster,
                shard,
                tensor=world.tensor,
                context=world.context,
                sliced=sliced and shard > 1,
                pipeline=world.pipeline,
                chunks=world.virtual_pipeline,
            )
            if shape.ranks == ranks:
                yield shape


def _mode(shape: WorldShape) -> str:
    return "slice" if shape.sliced else "experts"


def _divisors(number: int, most: int = LARGEST_MICRO_BATCH) -> list[int]:
    """Return the divisors up to `most`, ascending; found in pairs where the square root is the lower limit."""
    root = isqrt(number)
    low = [divisor for divisor in range(1, min(root, most) + 1) if number % divisor == 0]
    if most <= root:
        return low
    high = [number // divisor for divisor in reversed(low) if divisor * divisor != number]
    return low + [divisor for divisor in high if divisor <= most]


def settled(config: RunConfig, layout: LayoutOption) -> RunConfig:
    """Return the configuration with the layout's keys."""
    shape = layout.shape
    world = {
        "data": shape.data,
        "cluster": shape.cluster,
        "shard": shape.shard,
        "shard_mode": _mode(shape),
        "zero_stage": layout.zero_stage,
    }
    return config.model_copy(
        update={
            "world": config.world.model_copy(update=world),
            "model": config.model.model_copy(update={"activation_checkpointing": layout.checkpointing}),
            "train": config.train.model_copy(update={"micro_batch_size": layout.batch.micro}),
        }
    )


def _remembered(config: RunConfig, layout: LayoutOption, vocabulary: int, limit: float) -> Option:
    memory = memory_of_rank(settled(config, layout), layout.shape, layout.batch, vocabulary)
    return Option(layout, memory, memory.total <= limit)


def _without_waste(fitting: list[Option]) -> list[Option]:
    """Return for each shape and recomputation the lowest ZeRO stage that fits, with the largest micro-batch.

    A larger micro-batch means fewer exchanges, and a higher stage saves nothing but memory.
    """
    kept: dict[tuple[WorldShape, bool], Option] = {}
    for option in fitting:
        layout = option.layout
        key, rank = (layout.shape, layout.checkpointing), (-layout.batch.micro, layout.zero_stage)
        held = kept.get(key)
        if held is None or rank < (-held.layout.batch.micro, held.layout.zero_stage):
            kept[key] = option
    return list(kept.values())


def _timed(config: RunConfig, option: Option, fabric: Fabric, vocabulary: int, popularity_LE: Floats) -> Option:
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
        fit = [_remembered(larger, layout, vocabulary, limit) for layout in layouts(larger, ranks)]
        if found := next((option for option in fit if option.fits), None):
            return f"{text}; {fabric.nodes * factor} nodes would do, {found.layout.overrides}"
    return f"{text}; more of these GPUs alone would not help: use a smaller model, sequence or GPUs with more memory"
