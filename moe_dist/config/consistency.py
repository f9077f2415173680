"""Checks between sections of a configuration; each raises a `ConfigError` that names keys and values."""

from collections.abc import Mapping

from moe_dist.config.sections.data import CorpusConfig, TokenizerConfig
from moe_dist.config.sections.distill import DistillConfig
from moe_dist.config.sections.memory import MemoryConfig
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.sections.moe import MoEConfig
from moe_dist.config.sections.precision import PrecisionConfig
from moe_dist.config.sections.recluster import ReclusterConfig
from moe_dist.config.sections.train import OptimizerConfig, TrainConfig
from moe_dist.config.sections.world import WorldConfig
from moe_dist.errors import ConfigError


def standard_steps(moe: MoEConfig, train: TrainConfig) -> int:
    """Return the number of steps of the standard warm-up, 0 without one."""
    return round(moe.warmup_standard * train.steps)


def check_attention_layout(world: WorldConfig, model: ModelConfig) -> None:
    """Reject a model that does not divide over the ranks of attention."""
    tensor, parts = world.tensor, world.tensor * world.context
    if parts > 1 and model.latent is not None:
        raise ConfigError(
            f"world.tensor={tensor} x world.context={world.context} does not work with model.latent: leave both at 1"
        )
    over_both = f"world.tensor={tensor} x world.context={world.context}"
    for key, size, number, over in (
        ("model.heads", model.heads, parts, over_both),
        ("model.kv_heads", model.kv_heads or model.heads, tensor, f"world.tensor={tensor}"),
        ("model.sequence_length", model.sequence_length, parts, over_both),
    ):
        if size % number:
            raise ConfigError(f"{key}={size} is not divisible by {over}: change one of them")
    if tensor > 1 and model.qk_norm == "width":
        raise ConfigError(
            f"model.qk_norm=width does not work with world.tensor={tensor}, which divides the heads that it normalizes "
            "together: use world.context instead"
        )


def check_dense_layers(model: ModelConfig, moe: MoEConfig, memory: MemoryConfig) -> None:
    """Require at least one layer of experts after leading dense layers."""
    if not moe.dense_layers:
        return
    if not moe.layer_kind.routed or moe.dense_layers >= model.layers:
        raise ConfigError(
            f"moe.dense_layers={moe.dense_layers} leaves no layer of experts: must be < model.layers={model.layers}, "
            "and 0 with moe.kind=dense"
        )
    _reject({"memory.offload=true": (memory.offload, "false")}, f"moe.dense_layers={moe.dense_layers}")


def check_pipeline(world: WorldConfig, model: ModelConfig, memory: MemoryConfig, moe: MoEConfig) -> None:
    """Reject layers that do not divide over pipeline stages, and what does not work with stages."""
    stages, chunks = world.pipeline, world.virtual_pipeline
    if chunks > 1 and stages == 1:
        raise ConfigError(f"world.virtual_pipeline={chunks} needs world.pipeline > 1")
    if model.layers % (stages * chunks):
        of_chunks = f" x world.virtual_pipeline={chunks}" if chunks > 1 else ""
        raise ConfigError(
            f"model.layers={model.layers} is not divisible by world.pipeline={stages}{of_chunks}: change one of them"
        )
    size = model.layers // (stages * chunks)
    last = (chunks - 1) * stages * size + size - 1
    if stages > 1 and moe.dense_layers > last:
        raise ConfigError(
            f"moe.dense_layers={moe.dense_layers}: the first of world.pipeline={stages} stages, whose last layer is "
            f"number {last}, would have no experts: give each stage more layers"
        )
    if stages > 1:
        _reject({"memory.offload=true": (memory.offload, "false")}, f"world.pipeline={stages}")


def check_warmup(moe: MoEConfig, train: TrainConfig) -> None:
    """Require at least one step before and after the end of a standard warm-up."""
    steps = standard_steps(moe, train)
    if moe.warmup_standard and not 0 < steps < train.steps:
        raise ConfigError(
            f"moe.warmup_standard={moe.warmup_standard} of train.steps={train.steps} is {steps} steps: at least 1 "
            "must be trained before and after the experts are clustered"
        )


def check_precision(precision: PrecisionConfig, moe: MoEConfig) -> None:
    """Require low-rank factors where quantization is configured."""
    if precision.residuals != "none" and not moe.layer_kind.clustered:
        raise ConfigError(
            f"precision.residuals={precision.residuals} works with moe.kind=clustered only, not {moe.kind}: set it to "
            "none"
        )


def check_packed(precision: PrecisionConfig, memory: MemoryConfig, train: TrainConfig) -> None:
    """Reject what does not work with factors that are trained in quantized form."""
    if precision.residuals != "packed":
        return
    refused = {
        "memory.offload=true": (memory.offload, "false"),
        "precision.symmetric=false": (not precision.symmetric, "true"),
        "train.precision=float16": (train.precision == "float16", "bfloat16 or float32"),
    }
    _reject(refused, "precision.residuals=packed")


def _reject(refused: Mapping[str, tuple[bool, str]], beside: str) -> None:
    """Raise for the first setting that is there, which does not work `beside` another; each has what would be right."""
    for setting, (found, right) in refused.items():
        if found:
            raise ConfigError(f"{setting} does not work with {beside}: set it to {right}")


def check_tokenizer(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> None:
    """Require a given tokenizer for chats, which need its template, and for tokenized files."""
    needs = {
        "chat": "the chat template of tokenizer.kind=hf",
        **dict.fromkeys(
            ("megatron", "tokens"), "the tokenizer that made its files: tokenizer.kind=hf and tokenizer.path"
        ),
    }
    for name, source in corpus.by_source.items():
        if source.kind in needs and tokenizer.kind != "hf":
            key = f"corpus.sources.{name}" if name else "corpus"
            raise ConfigError(f"{key}.kind={source.kind} needs {needs[source.kind]}, not {tokenizer.kind}")


def check_rank(model: ModelConfig, moe: MoEConfig, recluster: ReclusterConfig) -> None:
    """Limit the ranks of what is factorized from full experts: residuals, and bases of two levels."""
    largest = min(model.hidden_size, moe.expert_hidden)
    needed = moe.warmup_standard > 0 or recluster.transition == "refit"
    ranks = {"rank": moe.rank, **({"base_rank": moe.base_rank} if moe.two_level_base else {})}
    for key, rank in ranks.items():
        if needed and moe.layer_kind.clustered and rank > largest:
            raise ConfigError(
                f"moe.{key}={rank} is more than experts of model.hidden_size={model.hidden_size} and "
                f"moe.expert_hidden={moe.expert_hidden} can be cut to: at most {largest} with moe.warmup_standard or "
                "recluster.transition=refit"
            )


def check_trainable(
    optimizer: OptimizerConfig,
    moe: MoEConfig,
    recluster: ReclusterConfig,
    memory: MemoryConfig,
    precision: PrecisionConfig,
) -> None:
    """Reject what needs full weights to change, or a master copy of them, if only residuals are trained."""
    if optimizer.trainable == "all":
        return
    refused = {
        f"moe.kind={moe.kind}": not moe.layer_kind.clustered,
        f"moe.warmup_standard={moe.warmup_standard}": moe.warmup_standard > 0,
        f"recluster.period={recluster.period}": recluster.period is not None,
        "memory.offload=true": memory.offload,
        "precision.residuals=packed": precision.residuals == "packed",
    }
    for setting, found in refused.items():
        if found:
            raise ConfigError(f"optimizer.trainable={optimizer.trainable} does not work with {setting}: set it to all")


def check_muon(
    optimizer: OptimizerConfig,
    world: WorldConfig,
    moe: MoEConfig,
    memory: MemoryConfig,
    precision: PrecisionConfig,
) -> None:
    """Reject layouts that divide matrices, and optimizers of experts that are AdamW's alone."""
    if optimizer.kind == "adamw":
        return
    sliced = world.shard_mode == "slice" and world.shard > 1 and moe.layer_kind.clustered
    divided = {
        f"world.tensor={world.tensor}": (world.tensor > 1, "1"),
        "world.shard_mode=slice": (sliced, "replicate or experts"),
    }
    _reject(divided, "optimizer.kind=muon, which updates whole matrices")
    refused = {
        "memory.offload=true": (memory.offload, "false"),
        "precision.residuals=packed": (precision.residuals == "packed", "none, post or qat"),
        f"optimizer.trainable={optimizer.trainable}": (optimizer.trainable != "all", "all"),
    }
    _reject(refused, "optimizer.kind=muon")


def check_offload(memory: MemoryConfig, moe: MoEConfig) -> None:
    """Reject features that offload does not support."""
    if not memory.offload:
        return
    if not moe.layer_kind.clustered:
        raise ConfigError(f"memory.offload=true works with moe.kind=clustered only, not {moe.kind}")
    if moe.overlap_chunks not in ("auto", 1):
        raise ConfigError(
            f"moe.overlap_chunks={moe.overlap_chunks} does not work with memory.offload=true, which would load a "
            "cluster for each chunk: use auto or 1"
        )


def check_slices(
    world: WorldConfig, moe: MoEConfig, precision: PrecisionConfig, memory: MemoryConfig, recluster: ReclusterConfig
) -> None:
    """Reject what does not work with experts that are sliced along their hidden width."""
    if world.shard_mode != "slice" or world.shard == 1 or not moe.layer_kind.clustered:
        return
    width = moe.expert_hidden // world.shard
    refused = {
        f"recluster.period={recluster.period}": (recluster.period is not None, "null"),
        f"moe.warmup_standard={moe.warmup_standard}": (moe.warmup_standard > 0, "0"),
        f"moe.base={moe.base}": (moe.two_level_base, "cluster"),
        "memory.offload=true": (memory.offload, "false"),
        "precision.residuals=packed": (precision.residuals == "packed", "none, post or qat"),
        f"precision.group_size={precision.group_size}": (
            precision.residuals != "none" and width % precision.group_size > 0,
            f"a divisor of a slice's width, {width}",
        ),
    }
    _reject(refused, "world.shard_mode=slice")


def check_distill(
    distill: DistillConfig,
    world: WorldConfig,
    moe: MoEConfig,
    train: TrainConfig,
    optimizer: OptimizerConfig,
) -> None:
    """Reject data, layouts and kinds of training that do not work with a teacher."""
    if distill.teacher is None:
        _reject({f"distill.router_steps={distill.router_steps}": (distill.router_steps > 0, "0")}, "no distill.teacher")
        return
    refused = {
        f"world.tensor={world.tensor}": (world.tensor > 1, "1"),
        f"world.pipeline={world.pipeline}": (world.pipeline > 1, "1"),
    }
    _reject(refused, "distill.teacher")
    alone = distill.router_steps > 0
    refused = {
        f"moe.kind={moe.kind}": (alone and not moe.layer_kind.routed, "clustered or standard"),
        f"optimizer.trainable={optimizer.trainable}": (alone and optimizer.trainable != "all", "all"),
        f"moe.warmup_standard={moe.warmup_standard}": (alone and moe.warmup_standard > 0, "0"),
        f"train.steps={train.steps}": (distill.router_steps > train.steps, f"at least {distill.router_steps}"),
    }
    _reject(refused, f"distill.router_steps={distill.router_steps}")


def check_recluster(recluster: ReclusterConfig, moe: MoEConfig, train: TrainConfig) -> None:
    """Reject re-clustering that has nothing to move or no step to do it."""
    if recluster.period is None:
        return
    if not moe.layer_kind.clustered:
        raise ConfigError(
            f"recluster.period={recluster.period} works with moe.kind=clustered only, not {moe.kind}: set it to null"
        )
    if moe.experts_per_cluster == 1 or moe.clusters == 1:
        raise ConfigError(
            f"recluster.period={recluster.period} has nothing to regroup: moe.experts={moe.experts} in "
            f"moe.clusters={moe.clusters}"
        )
    if int(recluster.max_moved * moe.experts) < 2:
        raise ConfigError(
            f"recluster.max_moved={recluster.max_moved:g} of moe.experts={moe.experts} allows less than one exchange "
            f"of two experts: must be >= {2 / moe.experts:g}"
        )
    for key, value in (("period", recluster.period), ("start", recluster.start)):
        if value >= train.steps:
            raise ConfigError(f"recluster.{key}={value} is longer than the run: train.steps={train.steps}")
    if recluster.stop is not None and recluster.stop < recluster.start:
        raise ConfigError(f"recluster.stop={recluster.stop} is before recluster.start={recluster.start}")
