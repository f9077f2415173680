"""Clustered experts in the place of the feed-forward layers of a model of transformers.

Shapes: S tokens of a sequence, B sequences, D hidden, F width of a feed-forward layer.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.config import MoEConfig
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError
from moe_dist.moe.clustered_experts import ClusterBase, ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.parameter_class import OF_EXPERTS, class_of

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class BatchFirst(nn.Module):
    """Clustered layer for [B, S, D], the layout of transformers."""

    def __init__(self, layer: ClusteredMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output of `hidden` [B, S, D], in its shape; collective over the ranks of its mesh."""
        output: Tensor = self.layer(hidden.transpose(0, 1))
        return output.transpose(0, 1)


@torch.no_grad()
def convert(model: nn.Module, moe: MoEConfig, *, mesh: Mesh | DeviceMesh | None = None, seed: int = 0) -> nn.Module:
    """Replace every dense SwiGLU layer of a model of transformers by clustered experts that compute the same, in place.

    Each cluster's base is the layer, and residuals start at zero, so that training goes on from the model's function.

    Args:
        moe: number of experts and clusters, rank, routing; `expert_hidden` is taken from the model.
        mesh: as that of `ClusteredMoE`.
        seed: seed of routers and residuals.

    Returns:
        The model.

    Raises:
        ConfigError: the configuration computes something else, or the model has no such layer.
    """
    if not moe.layer_kind.clustered or moe.two_level_base or moe.gate_scale != 1 or not moe.normalize_gates:
        raise ConfigError(
            "convert needs moe.kind=clustered, moe.base=cluster, moe.gate_scale=1 and moe.normalize_gates=true: others "
            "would compute something else"
        )
    activation = getattr(getattr(model, "config", None), "hidden_act", "silu")
    found = [path for path, module in model.named_modules() if all(hasattr(module, name) for name in PROJECTIONS)]
    if not found or activation != "silu":
        raise ConfigError(
            f"{type(model).__name__} has no dense SwiGLU layers (gate_proj, up_proj, down_proj with silu)"
        )
    if any(getattr(model.get_submodule(path), name).bias is not None for path in found for name in PROJECTIONS):
        raise ConfigError(f"feed-forward layers with biases, as {type(model).__name__} has, cannot be converted")
    for number, path in enumerate(found):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _clustered(model.get_submodule(path), moe, mesh, seed + number))
    # DistributedDataParallel would overwrite and average the clusters of different ranks
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        name for name, parameter in model.named_parameters() if class_of(parameter) in OF_EXPERTS
    ]
    return model


def _clustered(dense: Any, moe: MoEConfig, mesh: Mesh | DeviceMesh | None, seed: int) -> BatchFirst:
    """Return the clustered layer of one dense layer, with its type and device."""
    gate_FD, up_FD, down_DF = (getattr(dense, name).weight for name in PROJECTIONS)
    width, hidden = gate_FD.shape
    layer = ClusteredMoE(hidden, moe.model_copy(update={"expert_hidden": width}), mesh=mesh, seed=seed)
    for part in cast(list[ClusteredExperts], layer.clusters):
        base, residuals = cast(ClusterBase, part.base), part.residuals
        base.w_in_DH.copy_(torch.cat([gate_FD.T, up_FD.T], dim=1))
        base.w_out_FD.copy_(down_DF.T)
        for right in (residuals.in_v_NRH, residuals.out_v_NRD):
            cast(nn.Parameter, right).zero_()
    return BatchFirst(layer.to(device=gate_FD.device, dtype=gate_FD.dtype))
