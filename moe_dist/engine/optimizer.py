"""Optimizer: AdamW, and its parameter groups by weight decay, learning rate and reduction group."""

from typing import Any, NamedTuple

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moe_dist.config import OptimizerConfig
from moe_dist.engine.expert_process_groups import has_experts

MOMENTS = ("exp_avg", "exp_avg_sq")
VECTORS = ("hidden_gate_NF", "hidden_bias_NH", "output_bias_ND")
FEED_FORWARD = {"w_in_DH", "w_out_FD", "w_in", "w_out"}  # dense layers and bases; standard experts


class UpdateRule(NamedTuple):
    """Weight decay of a parameter, and its learning rate relative to the global one."""

    weight_decay: float
    lr_scale: float


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return True if weight decay applies: not for norms, biases, expert vectors and embeddings."""
    return parameter.ndim > 1 and "embedding" not in name and name.rpartition(".")[2] not in VECTORS


def _kind(name: str, parameter: nn.Parameter) -> str:
    if ".router." in name:
        return "router"
    if FEED_FORWARD & set(name.split(".")):
        return "feed forward"
    return "decayed" if decays(name, parameter) else "undecayed"


def _rules(optimizer: OptimizerConfig) -> dict[str, UpdateRule]:
    decay = optimizer.weight_decay
    return {
        "decayed": UpdateRule(decay, 1.0),
        "undecayed": UpdateRule(0.0, 1.0),
        "feed forward": UpdateRule(decay, optimizer.feed_forward_lr_scale),
        "router": UpdateRule(decay, optimizer.router_lr_scale),
    }


def update_rule(name: str, parameter: nn.Parameter, optimizer: OptimizerConfig) -> UpdateRule:
    """Return the update rule of one parameter."""
    return _rules(optimizer)[_kind(name, parameter)]


def adamw_step(
    master: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    learning_rate: float,
    rule: UpdateRule,
    options: OptimizerConfig,
) -> None:
    """Update weights and moments in place by torch's fused AdamW.

    Args:
        moments: first and second moment.
        step: number of updates made before.
    """
    adamw(
        [master], [gradient], [moments[0]], [moments[1]], [], [torch.tensor(float(step), device=master.device)],
        fused=True, amsgrad=False, beta1=options.beta1, beta2=options.beta2, lr=learning_rate * rule.lr_scale,
        weight_decay=rule.weight_decay, eps=options.epsilon, maximize=False,
    )  # fmt: skip


def build_optimizer(model: nn.Module, options: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the model's parameter groups; its states are created by the first step."""
    return torch.optim.AdamW(
        parameter_groups(model, options),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=True,
    )


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, in the same order on all ranks."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "name": kind,  # which DeepSpeed replaces for experts
            "router": kind == "router",
            "params": [parameter for name, parameter in named if _kind(name, parameter) == kind],
            **rule._asdict(),
        }
        for kind, rule in _rules(optimizer).items()
    ]
    if has_experts(model):
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
        # DeepSpeed iterates over a set of names, whose order differs between processes; without sorting, ranks would
        # reduce different groups with each other
        groups.sort(key=lambda group: (group.get("moe", False), -group["weight_decay"], group["name"]))
    return [group for group in groups if group["params"]]
