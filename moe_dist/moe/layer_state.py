"""Routing state of an MoE layer in its `state_dict()`: selection biases and the members of the clusters.

This state is kept outside the module, since a mixed-precision engine casts buffers. These hooks save and load it.
"""

from typing import Any

import torch
from torch import Tensor, nn

EXPERT_BIAS, CLUSTER_BIAS, MEMBERS = "expert_bias_E", "cluster_bias_G", "member_GN"


def save_routing_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Add the routing state to a `state_dict()`; a state-dict hook."""
    layer: Any = module
    state[f"{prefix}{EXPERT_BIAS}"] = layer.balance.expert_bias_LE[layer.layer].detach().clone()
    if layer.context.placements:
        state[f"{prefix}{CLUSTER_BIAS}"] = layer.balance.cluster_bias_LG[layer.layer].detach().clone()
        state[f"{prefix}{MEMBERS}"] = layer.member_GN.detach().clone()


def load_routing_state(
    module: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str], *__: Any
) -> None:
    """Load the routing state and remove it from the dictionary; a load-state-dict hook."""
    layer: Any = module
    wanted = {EXPERT_BIAS: layer.balance.expert_bias_LE[layer.layer]}
    if layer.context.placements:
        wanted[CLUSTER_BIAS] = layer.balance.cluster_bias_LG[layer.layer]
        wanted[MEMBERS] = layer.member_GN
    found: dict[str, Tensor] = {name: state.pop(f"{prefix}{name}") for name in wanted if f"{prefix}{name}" in state}
    if strict:
        missing += [f"{prefix}{name}" for name in wanted if name not in found]
    for name in found.keys() - {MEMBERS}:
        wanted[name].copy_(found[name])
    if MEMBERS in found and not torch.equal(found[MEMBERS].cpu(), layer.member_GN.cpu()):
        members = tuple(tuple(row) for row in found[MEMBERS].tolist())
        layer.context.placements[layer.layer] = layer.placement.with_members(members)
        layer.follow_placement()
