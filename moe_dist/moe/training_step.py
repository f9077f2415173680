"""Gradient reduction and load balancing of MoE layers in a custom training loop."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.errors import ConfigError
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.parameter_class import OF_EXPERTS, ParameterClass, class_of, copies_of
from moe_dist.moe.standard_moe import StandardMoE

OVER_ALL_RANKS = (GroupKind.EXPERT_PARALLEL, GroupKind.EXPERT_DATA)
"""Groups of a mesh over which two successive all-reduces are an all-reduce over all ranks."""
SUMMED_OVER = {
    ParameterClass.DENSE: OVER_ALL_RANKS,
    ParameterClass.BASE: (GroupKind.BASE_DATA,),
    ParameterClass.EXPERT: (GroupKind.EXPERT_DATA,),
}
"""Groups over which the gradients of a class of parameters are summed."""


def moe_layers(module: nn.Module) -> list[ClusteredMoE | StandardMoE]:
    """Return the MoE layers in a module.

    Raises:
        ConfigError: there are none.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ClusteredMoE | StandardMoE)]
    if not layers:
        raise ConfigError(f"{type(module).__name__} holds no ClusteredMoE and no StandardMoE layer")
    return layers


def train_residuals_only(module: nn.Module) -> None:
    """Freeze all parameters but the low-rank factors and vectors of clustered experts.

    Call it before an optimizer is created, and before FSDP2 shards the parameters.

    Raises:
        ConfigError: the module has no MoE layer.
    """
    moe_layers(module)
    for parameter in module.parameters():
        parameter.requires_grad_(class_of(parameter) is ParameterClass.EXPERT)


@torch.no_grad()
def average_gradients(module: nn.Module, *, experts_only: bool = False) -> None:
    """Average gradients, so that each is the gradient of the mean of all ranks' losses; collective.

    Call it after `backward()`, instead of DistributedDataParallel, which would average different experts. Gradients of
    experts and of bases are summed over the ranks that hold their replicas, all others over all ranks of the layers'
    mesh; each sum is divided by the number of ranks. A missing gradient counts as zero.

    Args:
        experts_only: leave out all other parameters, which DistributedDataParallel has averaged.

    Raises:
        ConfigError: the module has no MoE layer.
    """
    mesh = moe_layers(module)[0].context.mesh
    for parameter in module.parameters():
        parameter_class = class_of(parameter)
        if not parameter.requires_grad or (experts_only and parameter_class not in OF_EXPERTS):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _sum_over(parameter.grad, mesh, SUMMED_OVER[parameter_class])
        parameter.grad /= mesh.shape.ranks


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients by their global norm, in which each element counts once; return the norm. Collective.

    Call it after `average_gradients`, or after the backward pass of a model under FSDP2, where the norms of torch and
    of each rank leave out the experts of other ranks.

    Raises:
        ConfigError: the module has no MoE layer.
    """
    mesh = moe_layers(module)[0].context.mesh
    held = [parameter for parameter in module.parameters() if parameter.grad is not None]
    square = torch.zeros((), dtype=torch.float64, device=held[0].device)
    for parameter in held:
        square += _local_square(parameter, mesh)
    _sum_over(square, mesh, OVER_ALL_RANKS)
    norm = square.sqrt().float()
    for parameter in held:
        _local(parameter.grad).mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def update_load_balance(module: nn.Module) -> dict[str, Tensor]:
    """Update the selection biases by the loads since the last call; collective.

    Call it once per step, after the backward passes.

    Returns:
        count_LE: copies routed to each expert of each MoE layer on all ranks, int64 [L, E]; dropped_L: copies dropped
        beyond the capacity.

    Raises:
        ConfigError: the module has no MoE layer.
    """
    layers = moe_layers(module)
    counts: list[Tensor] = []
    drops: list[Tensor] = []
    contexts = {id(layer.context): layer.context for layer in layers}
    for context in contexts.values():
        balance = context.balance
        for tensor in (balance.count_LE, balance.dropped_L):
            _sum_over(tensor, context.mesh, OVER_ALL_RANKS)
        counts.append(balance.count_LE.clone())
        drops.append(balance.dropped_L.clone())
        balance.update(counts[-1], context.placements)
        balance.clear_counts()
    return {"count_LE": torch.cat(counts), "dropped_L": torch.cat(drops)}


def _sum_over(tensor: Tensor, mesh: Mesh, kinds: tuple[GroupKind, ...]) -> None:
    for group in (mesh.group(kind) for kind in kinds):
        if group.size > 1:
            dist.all_reduce(tensor, group=group.handle)


def _local(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor, which may be a DTensor (whose import takes long)."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _local_square(parameter: nn.Parameter, mesh: Mesh) -> Tensor:
    """Return the square of a gradient's part on this rank, divided by the number of ranks that hold the same part."""
    grad: Any = parameter.grad
    copies = copies_of(parameter, mesh)
    if hasattr(grad, "to_local"):
        sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
        copies = math.prod(size for placement, size in sizes if placement.is_replicate())
    square: Tensor = torch.linalg.vector_norm(_local(grad), dtype=torch.float64).square()
    return square / copies
