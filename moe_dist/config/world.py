"""Resolution of a configuration for a number of ranks: mesh sizes and batch per rank."""

from dataclasses import dataclass
from math import gcd

from moe_dist.config.schema import RunConfig
from moe_dist.errors import ConfigError


@dataclass(frozen=True)
class WorldShape:
    """Sizes of the mesh axes: in each pipeline stage data x cluster x shard for experts, and for attention sequence
    groups x context x tensor.

    The ranks of a *sequence group* are neighbors and hold parts of the same sequences.

    Attributes:
        replicas: part of the data axis whose ranks are neighbors: replicas of a block of clusters inside of a node.
        tensor: ranks that divide attention heads, embedding and output layer; the innermost axis.
        context: parts of a sequence in attention.
        sliced: True if the ranks of the shard axis hold slices of every expert; False: different experts.
        pipeline: stages, each of which holds a part of the layers; the outermost axis.
        chunks: runs of consecutive layers that a stage holds.
    """

    data: int
    cluster: int
    shard: int
    replicas: int = 1
    tensor: int = 1
    context: int = 1
    sliced: bool = False
    pipeline: int = 1
    chunks: int = 1

    @property
    def expert_shards(self) -> int:
        """Number of parts into which the experts of a cluster are divided; 1: each rank has all of them, or slices."""
        return 1 if self.sliced else self.shard

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.stage_ranks * self.pipeline

    @property
    def stage_ranks(self) -> int:
        """Number of ranks of a pipeline stage, which all hold the same layers."""
        return self.data * self.cluster * self.shard

    @property
    def sequence_parts(self) -> int:
        """Number of ranks that hold parts of the same sequences."""
        return self.tensor * self.context

    @property
    def sequence_groups(self) -> int:
        """Number of groups of ranks over which the sequences of a batch are divided."""
        return self.stage_ranks // self.sequence_parts

    def __str__(self) -> str:
        near = f" ({self.replicas} replicas of a block of clusters on neighboring ranks)" if self.replicas > 1 else ""
        parts = f", tensor {self.tensor} x context {self.context}" if self.sequence_parts > 1 else ""
        sliced = " (slices of the hidden width)" if self.sliced else ""
        stages = f"pipeline {self.pipeline} x " if self.pipeline > 1 else ""
        chunks = f", {self.chunks} chunks of layers a stage" if self.chunks > 1 else ""
        return f"{stages}data {self.data} x cluster {self.cluster} x shard {self.shard}{sliced}{near}{parts}{chunks}"


@dataclass(frozen=True)
class BatchShape:
    """Batch of a rank, or of a sequence group: `accumulation` micro-batches of `micro` sequences per step."""

    micro: int
    accumulation: int


def resolve_world(config: RunConfig, ranks: int) -> WorldShape:
    """Resolve `world.data|cluster|shard` for a number of ranks; axes that are null are filled in.

    Raises:
        ConfigError: the product of the axes is not `ranks`, or the axes of attention do not divide a stage's ranks.
    """
    world = config.world
    if ranks % world.pipeline:
        raise ConfigError(f"world.pipeline={world.pipeline} does not divide the number of ranks ({ranks})")
    of_stage, stages = ranks // world.pipeline, "" if world.pipeline == 1 else f" / world.pipeline={world.pipeline}"
    if of_stage % (world.tensor * world.context):
        raise ConfigError(
            f"world.tensor={world.tensor} x world.context={world.context} does not divide the number of ranks "
            f"({ranks}{stages})"
        )
    if of_stage % world.shard:
        raise ConfigError(f"world.shard={world.shard} does not divide the number of ranks ({ranks}{stages})")
    per_shard = of_stage // world.shard
    cluster = world.cluster
    if cluster is None:
        units = config.moe.layer_kind.cluster_units(config.moe, world.shard)
        cluster = gcd(units, per_shard if world.data is None else max(per_shard // world.data, 1))
    data = world.data if world.data is not None else max(per_shard // cluster, 1)
    if data * cluster * world.shard != of_stage:
        of_pipeline = f"world.pipeline={world.pipeline} x " if world.pipeline > 1 else ""
        raise ConfigError(
            f"{of_pipeline}world.data={data} x world.cluster={cluster} x world.shard={world.shard} = "
            f"{world.pipeline * data * cluster * world.shard} "
            f"ranks, but there are {ranks}: {_data_that_fits(of_stage, cluster * world.shard)}start that many, or "
            "change another of these keys"
        )
    attention, layers = (world.tensor, world.context), (world.pipeline, world.virtual_pipeline)
    if config.moe.layer_kind.clustered and world.shard_mode == "replicate":
        return WorldShape(data * world.shard, cluster, 1, world.shard, *attention, False, *layers)
    sliced = config.moe.layer_kind.clustered and world.shard_mode == "slice" and world.shard > 1
    return WorldShape(data, cluster, world.shard, 1, *attention, sliced, *layers)


def _data_that_fits(ranks: int, held: int) -> str:
    """Return the value of `world.data` for the ranks of a stage, of which `held` have all experts; empty: none fits."""
    return "" if ranks % held else f"set world.data={ranks // held}, or "


def resolve_batch(config: RunConfig, ranks: int) -> BatchShape:
    """Divide `train.global_batch_size` over the ranks, or their sequence groups, and into micro-batches.

    Raises:
        ConfigError: it does not divide.
    """
    train, world = config.train, config.world
    parts = world.tensor * world.context * world.pipeline
    groups, by = ranks // parts, "" if parts == 1 else f" / {parts} ranks that share a sequence"
    if train.global_batch_size % groups:
        below = train.global_batch_size // groups * groups
        near = f"{below} or {below + groups}" if below else str(groups)
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not divisible by {ranks} ranks{by}: {near} would be"
        )
    per_rank = train.global_batch_size // groups
    micro = train.micro_batch_size or per_rank
    if per_rank % micro:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} / {ranks} ranks{by} = {per_rank} sequences a rank, "
            f"not divisible by train.micro_batch_size={micro}"
        )
    accumulation = per_rank // micro
    if world.virtual_pipeline > 1 and accumulation % world.pipeline:
        raise ConfigError(
            f"{accumulation} micro-batches a step are not divisible by world.pipeline={world.pipeline}, as stages of "
            f"world.virtual_pipeline={world.virtual_pipeline} need: change train.micro_batch_size"
        )
    return BatchShape(micro, accumulation)


def tokens_on_rank(config: RunConfig, shape: WorldShape, batch: BatchShape) -> int:
    """Return the tokens of one micro-batch whose feed-forward layers a rank routes."""
    return batch.micro * config.model.sequence_length // shape.sequence_parts


def with_sizes(config: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration with the sizes of `world` that it has on this number of ranks.

    Raises:
        ConfigError: the ranks do not fit it.
    """
    world, cluster = config.world, resolve_world(config, ranks).cluster
    sizes = {"cluster": cluster, "data": ranks // (world.pipeline * cluster * world.shard)}
    return config.model_copy(update={"world": world.model_copy(update=sizes)})
