"""Clustered experts in a plain torch loop with FSDP2 (`torch.distributed.fsdp.fully_shard`)."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from moe_dist.distributed.mesh import GroupKind
from moe_dist.errors import ConfigError
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.training_step import moe_layers


def shard_experts(model: nn.Module, **options: Any) -> nn.Module:
    """Apply `fully_shard` to each cluster over the ranks that hold a replica of it, and average as over all ranks.

    Call it before `fully_shard` of the blocks and of the model, which then shard all other parameters over their own
    mesh; without it they would mix the weights of different clusters. Parameters become DTensors: create the optimizer
    afterwards, clip by `moe_dist.clip_grad_norm_`, and leave out `average_gradients`.

    Args:
        options: further arguments of `fully_shard`, such as `mp_policy` and `reshard_after_forward`.

    Returns:
        The model.

    Raises:
        ConfigError: the model has no clustered layer, there is no process group, or a cluster's experts are divided.
    """
    for layer in moe_layers(model):
        mesh = layer.context.mesh
        group = mesh.group(GroupKind.EXPERT_DATA).handle
        if not isinstance(layer, ClusteredMoE):
            raise ConfigError("shard_experts shards clustered experts; this model has layers of standard experts")
        if group is None:
            raise ConfigError(
                "no process group: call torch.distributed.init_process_group first, then create the layers"
            )
        if mesh.shape.shard > 1:
            raise ConfigError(f"a mesh of shard={mesh.shape.shard} divides a cluster's experts: FSDP2 needs shard=1")
        device = layer.router.weight_ED.device.type
        replicas = DeviceMesh.from_group(group, device, mesh_dim_names=("expert_data",))
        for cluster in layer.clusters:
            fully_shard(cluster, mesh=replicas, **options)
            cluster.set_gradient_divide_factor(mesh.shape.ranks)  # type: ignore[operator]
            if replicas.size() > 1 and dist.get_backend(group) != "nccl":  # only NCCL multiplies inside of a reduction
                cluster.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model
