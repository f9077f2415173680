"""Typed, validated configuration; imports no torch, so that errors come at once."""

from moe_dist.config.load import dump_config, load_config
from moe_dist.config.schema import RunConfig
from moe_dist.config.sections.base import Section
from moe_dist.config.sections.checkpoint import CheckpointConfig
from moe_dist.config.sections.data import CorpusConfig, TokenizerConfig
from moe_dist.config.sections.memory import MemoryConfig
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.sections.moe import MoEConfig
from moe_dist.config.sections.precision import PrecisionConfig
from moe_dist.config.sections.recluster import ReclusterConfig
from moe_dist.config.sections.train import OptimizerConfig, TrainConfig
from moe_dist.config.sections.world import WorldConfig
from moe_dist.config.world import BatchShape, WorldShape, resolve_batch, resolve_world, tokens_on_rank, with_sizes

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
    "tokens_on_rank",
    "with_sizes",
]
