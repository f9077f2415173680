"""Typed, validated configuration; imports no torch, so that refusals come at once."""

from moe_dist.config.load import dump_config, load_config
from moe_dist.config.schema import (
    CheckpointConfig,
    CorpusConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PrecisionConfig,
    ReclusterConfig,
    RunConfig,
    Section,
    TokenizerConfig,
    TrainConfig,
    WorldConfig,
)
from moe_dist.config.world import BatchShape, WorldShape, resolve_batch, resolve_world

__all__ = [
    "BatchShape",
    "CheckpointConfig",
    "CorpusConfig",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "ReclusterConfig",
    "RunConfig",
    "Section",
    "TokenizerConfig",
    "TrainConfig",
    "WorldConfig",
    "WorldShape",
    "dump_config",
    "load_config",
    "resolve_batch",
    "resolve_world",
]
