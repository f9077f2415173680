"""Quantized clusters as tensors of an exported file: names, values, and their reader.

A factor `...expert.17.in_u_DR` is stored as its parts, `...expert.17.in_u_DR.codes`, `.scales` and, unless it is
symmetric, `.zeros`, with its long axis last. Other tensors keep their names.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_dist.compression import QuantizedCluster, QuantizedFactor, StorageFormat, long_axis
from moe_dist.config import RunConfig
from moe_dist.errors import CheckpointError

_BASES = ("w_in_DH", "w_out_FD")
Get = Callable[[str], Tensor]


def is_of_cluster(name: str) -> bool:
    """Return True if quantization changes a tensor of this name: a factor or a base."""
    leaf = name.rpartition(".")[2]
    return (".expert." in name and long_axis(leaf) is not None) or (".cluster." in name and leaf in _BASES)


def dtype_to_quantize(name: str, config: RunConfig) -> torch.dtype:
    """Return the type in which a tensor is read to be quantized: the one that the model computes with.

    Factors that were trained quantized are read in float32, which represents their values exactly.
    """
    packed = config.precision.residuals == "packed" and long_axis(name.rpartition(".")[2]) is not None
    dtype: torch.dtype = torch.float32 if packed else getattr(torch, config.train.precision)
    return dtype


def quantized_tensors_of(name: str, value: Tensor, form: StorageFormat) -> dict[str, Tensor]:
    """Return the tensors, by name, that an exported file holds for one tensor of a model."""
    if not is_of_cluster(name):
        return {name: value}
    axis = long_axis(name.rpartition(".")[2])
    if axis is None:
        return {name: value.to(form.bases)}
    return {f"{name}.{part}": tensor for part, tensor in QuantizedFactor.of(value, axis, form.factors).parts().items()}


def read_quantized_cluster(
    like: QuantizedCluster, path: str, cluster: int, experts: Sequence[int], get: Get
) -> QuantizedCluster:
    """Read this rank's part of a quantized cluster from an exported file.

    Args:
        like: its format and sizes, on `meta`.
        path: name of the layer's module.
        experts: experts of this shard, by slot.
        get: returns a tensor of the file by its name.

    Raises:
        CheckpointError: a tensor is missing, or has another type or shape.
    """
    bases = [
        _checked(f"{path}.cluster.{cluster}.{name}", get, own).to(own.dtype)
        for name, own in zip(_BASES, (like.base_in_DH, like.base_out_FD), strict=True)
    ]
    found = {}
    for name, own in like.experts.parts().items():
        leaf = name.replace("_N", "_", 1)  # without the axis over experts, as in `parameter_names.py`
        rows = [_checked(f"{path}.expert.{e}.{leaf}", get, own[0]) for e in experts]
        found[name] = torch.stack(rows)
    return QuantizedCluster(bases[0], bases[1], like.experts.with_parts(found))


def _checked(name: str, get: Get, own: Tensor) -> Tensor:
    """Return a tensor of the file after checking its shape and, for packed parts, its type."""
    value = get(name)
    exact = own.dtype == torch.uint8 or name.endswith(".scales")
    if value.shape != own.shape or (exact and value.dtype != own.dtype):
        raise CheckpointError(f"{name} is {value.dtype} {tuple(value.shape)}, expected {own.dtype} {tuple(own.shape)}")
    return value
