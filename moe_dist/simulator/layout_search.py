"""Layouts that a job could have: axes of ranks, ZeRO stage, micro-batches, recomputation.

An axis of attention or of layers that the configuration sets keeps its size; the others are searched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import isqrt

from pydantic import ValidationError

from moe_dist.config import BatchShape, RunConfig, WorldShape
from moe_dist.config.sections.world import WorldConfig
from moe_dist.errors import ConfigError

LARGEST_MICRO_BATCH = 1 << 16
"""Largest micro-batch per rank that is considered, sequences; so any global batch size is planned at once."""
MOST_CHUNKS = 8
"""Largest number of runs of layers a stage that is considered."""
SEARCHED = ("tensor", "context", "pipeline", "virtual_pipeline")


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
            f"{self._attention_and_stages}world.data={shape.data} world.cluster={shape.cluster} {shard}"
            f"world.zero_stage={self.zero_stage} train.micro_batch_size={self.batch.micro} "
            f"model.activation_checkpointing={str(self.checkpointing).lower()}"
        )

    @property
    def _attention_and_stages(self) -> str:
        shape = self.shape
        sizes = zip(SEARCHED, (shape.tensor, shape.context, shape.pipeline, shape.chunks), strict=True)
        return "".join(f"world.{key}={size} " for key, size in sizes if size > 1)


def layouts(config: RunConfig, ranks: int, vocabulary: int, devices_per_node: int) -> Iterator[LayoutOption]:
    """Return shapes that divide experts and ranks, with every ZeRO stage, micro-batch and choice of recomputation.

    Tensor groups stay inside of nodes.

    Raises:
        ConfigError: the batch does not divide over the ranks of any shape.
    """
    batch, found = config.train.global_batch_size, False
    for shape in _shapes(config, ranks, vocabulary, devices_per_node):
        if batch % shape.sequence_groups:
            continue
        found = True
        for micro in _divisors(batch // shape.sequence_groups):
            accumulation = batch // shape.sequence_groups // micro
            if shape.chunks > 1 and accumulation % shape.pipeline:
                continue
            for zero_stage, checkpointing in product((0, 1, 2), (False, True)):
                yield LayoutOption(shape, zero_stage, BatchShape(micro, accumulation), checkpointing)
    if not found:
        nearest = max(1, round(batch / ranks)) * ranks
        raise ConfigError(
            f"train.global_batch_size={batch} is not divisible by {ranks} GPUs: use {nearest}, for example, or set "
            "world.tensor, world.context or world.pipeline to what divides the ranks"
        )


def _shapes(config: RunConfig, ranks: int, vocabulary: int, devices_per_node: int) -> Iterator[WorldShape]:
    clusters, shards = config.moe.layer_kind.units(config.moe)
    sliced = config.moe.layer_kind.clustered and config.world.shard_mode == "slice"
    if sliced:
        shards = config.moe.expert_hidden
    for world in _worlds(config, ranks, vocabulary, devices_per_node):
        stage_ranks = ranks // world.pipeline
        for cluster, shard in product(_divisors(clusters, stage_ranks), _divisors(shards, stage_ranks)):
            if stage_ranks % (cluster * shard) == 0:
                yield WorldShape(
                    stage_ranks // (cluster * shard),
                    cluster,
                    shard,
                    tensor=world.tensor,
                    context=world.context,
                    sliced=sliced and shard > 1,
                    pipeline=world.pipeline,
                    chunks=world.virtual_pipeline,
                )


def _worlds(config: RunConfig, ranks: int, vocabulary: int, devices_per_node: int) -> Iterator[WorldConfig]:
    """Return the sizes of attention's axes and of stages that divide the ranks and that the model allows."""
    model = config.model
    sizes = {
        "tensor": _divisors(model.kv_heads or model.heads, devices_per_node),
        "context": _divisors(model.heads, ranks),
        "pipeline": _divisors(model.layers, ranks),
        "virtual_pipeline": _divisors(model.layers, MOST_CHUNKS),
    }
    kept = {key: [getattr(config.world, key)] for key in config.world.model_fields_set.intersection(SEARCHED)}
    tree = config.model_dump()
    for chosen in product(*(kept.get(key, sizes[key]) for key in SEARCHED)):
        tensor, context, pipeline, chunks = chosen
        if ranks % (tensor * context * pipeline) or vocabulary % tensor or (chunks > 1 and pipeline == 1):
            continue
        tree["world"] |= dict(zip(SEARCHED, chosen, strict=True)) | {"data": None, "cluster": None, "shard": 1}
        try:
            yield RunConfig.model_validate(tree).world
        except (ConfigError, ValidationError):  # the model does not divide, or has what does not work with this axis
            continue


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
        **dict(zip(SEARCHED, (shape.tensor, shape.context, shape.pipeline, shape.chunks), strict=True)),
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
