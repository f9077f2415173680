"""Classes of parameters by the ranks that hold replicas, over which gradients are reduced."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

from torch import nn

from moe_dist.distributed.mesh import GroupKind, Mesh


class ParameterClass(StrEnum):
    """Class of a parameter; parameters that are not marked are dense."""

    DENSE = "dense"  # replicated on all ranks
    BASE = "base"  # a cluster's base: replicated over its cluster group and the data axis
    EXPERT = "expert"  # an expert's own weights: replicated over the data axis
    TENSOR = "tensor"  # a tensor-parallel shard: replicated over the ranks of the same tensor index


REDUCED_OVER = {
    ParameterClass.BASE: GroupKind.BASE_DATA,
    ParameterClass.EXPERT: GroupKind.EXPERT_DATA,
    ParameterClass.TENSOR: GroupKind.TENSOR_DATA,
}
"""Kind of process group over which a class's gradients are reduced; those of dense parameters over all ranks."""

OF_EXPERTS = (ParameterClass.BASE, ParameterClass.EXPERT)
"""Classes of the parameters that belong to experts."""

_ATTRIBUTE = "moe_dist_class"


def mark(module: nn.Module, parameter_class: ParameterClass) -> None:
    """Set the class of every parameter of `module`."""
    for parameter in module.parameters():
        mark_parameter(parameter, parameter_class)


def mark_parameter(parameter: nn.Parameter, parameter_class: ParameterClass) -> None:
    """Set the class of one parameter."""
    setattr(parameter, _ATTRIBUTE, parameter_class)


def class_of(parameter: nn.Parameter) -> ParameterClass:
    """Return the class of a parameter; dense if it was not marked."""
    return getattr(parameter, _ATTRIBUTE, ParameterClass.DENSE)


def numbers_by_class(parameters: Iterable[nn.Parameter]) -> Counter[ParameterClass]:
    """Return the number of elements of each class that occurs."""
    found = Counter[ParameterClass]()
    for parameter in parameters:
        found[class_of(parameter)] += parameter.numel()
    return found


def replicas_of(parameter_class: ParameterClass, mesh: Mesh) -> tuple[int, ...]:
    """Return the ranks that hold replicas of this rank's parameters of a class, over which gradients are reduced."""
    if parameter_class in REDUCED_OVER:
        return mesh.group(REDUCED_OVER[parameter_class]).ranks
    first = mesh.stage * mesh.shape.stage_ranks
    return tuple(range(first, first + mesh.shape.stage_ranks))


def copies_of(parameter: nn.Parameter, mesh: Mesh) -> int:
    """Return the number of ranks that hold a replica of a parameter."""
    return len(replicas_of(class_of(parameter), mesh))
