"""Optimizer groups: by weight decay and learning rate, and by which ranks reduce them."""

from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from moe_dist.config import OptimizerConfig
from moe_dist.engine.expert_groups import has_experts

VECTORS = ("hidden_gate_NF", "hidden_bias_NH", "output_bias_ND")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to norms, biases, expert vectors and embeddings."""
    return parameter.ndim > 1 and "embedding" not in name and name.rpartition(".")[2] not in VECTORS


def _kind(name: str, parameter: nn.Parameter) -> str:
    if ".router." in name:
        return "router"
    return "decayed" if decays(name, parameter) else "undecayed"


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer, in an order that is the same on all ranks."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    settings = {
        "decayed": {"weight_decay": optimizer.weight_decay, "lr_scale": 1.0},
        "undecayed": {"weight_decay": 0.0, "lr_scale": 1.0},
        "router": {"weight_decay": optimizer.weight_decay, "lr_scale": optimizer.router_lr_scale},
    }
    groups: list[dict[str, Any]] = [
        {"name": kind, "params": [parameter for name, parameter in named if _kind(name, parameter) == kind], **setting}
        for kind, setting in settings.items()
    ]
    if has_experts(model):
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
        # it walks a set of names, whose order differs between processes: ranks would reduce unlike groups together
        groups.sort(key=lambda group: (group.get("moe", False), -group["weight_decay"], group["name"]))
    return [group for group in groups if group["params"]]
