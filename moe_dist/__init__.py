"""Clustered Mixture-of-Experts: experts that share a base per cluster, routed in two stages (docs/library.md).

The names below are imported when first used: `import moe_dist` itself imports neither torch nor anything that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

if TYPE_CHECKING:
    from moe_dist.checkpoint.load_model import load_model as load_model
    from moe_dist.config import ModelConfig as ModelConfig
    from moe_dist.config import MoEConfig as MoEConfig
    from moe_dist.config import RunConfig as RunConfig
    from moe_dist.config import load_config as load_config
    from moe_dist.dispatch.traffic_ledger import TrafficLedger as TrafficLedger
    from moe_dist.distributed.mesh import Mesh as Mesh
    from moe_dist.distributed.placement import ExpertPlacement as ExpertPlacement
    from moe_dist.evaluation.trained_model import load_tokenizer as load_tokenizer
    from moe_dist.integrations.huggingface.drop_in import convert as convert
    from moe_dist.moe.clustered_moe import ClusteredMoE as ClusteredMoE
    from moe_dist.moe.standard_moe import StandardMoE as StandardMoE
    from moe_dist.moe.training_step import average_gradients as average_gradients
    from moe_dist.moe.training_step import clip_grad_norm_ as clip_grad_norm_
    from moe_dist.moe.training_step import train_residuals_only as train_residuals_only
    from moe_dist.moe.training_step import update_load_balance as update_load_balance
    from moe_dist.recluster.coordinator import Coordinator as Coordinator

__version__ = "0.1.0"
LIBRARIES = r"(torch|torchao|megatron|deepspeed|apex|transformers)\b"

_HOME = {
    "ClusteredMoE": "moe.clustered_moe",
    "Coordinator": "recluster.coordinator",
    "ExpertPlacement": "distributed.placement",
    "Mesh": "distributed.mesh",
    "MoEConfig": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "StandardMoE": "moe.standard_moe",
    "TrafficLedger": "dispatch.traffic_ledger",
    "average_gradients": "moe.training_step",
    "clip_grad_norm_": "moe.training_step",
    "convert": "integrations.huggingface.drop_in",
    "load_config": "config",
    "load_model": "checkpoint.load_model",
    "load_tokenizer": "evaluation.trained_model",
    "train_residuals_only": "moe.training_step",
    "update_load_balance": "moe.training_step",
}
"""Module of each public name."""

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Raises:
        AttributeError: there is no such public name.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'moe_dist' has no attribute {name!r}")
    with catch_warnings():  # of libraries that are imported for the first time, for their own developers
        filterwarnings("ignore", module=LIBRARIES)
        return getattr(import_module(f"moe_dist.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return list(__all__)
