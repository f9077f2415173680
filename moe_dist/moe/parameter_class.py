"""The three kinds of parameters, by which ranks hold the same copy and so reduce their gradients together."""

from enum import StrEnum

from torch import nn

from moe_dist.distributed.mesh import GroupKind


class ParameterClass(StrEnum):
    """Who holds a parameter; everything not marked is dense, the same on all ranks."""

    DENSE = "dense"
    BASE = "base"  # a cluster's base: its cluster group x data
    EXPERT = "expert"  # one expert's own weights: data only


REDUCED_OVER = {ParameterClass.BASE: GroupKind.BASE_DATA, ParameterClass.EXPERT: GroupKind.EXPERT_DATA}
"""The process group over which a class's gradients are reduced; dense ones over all ranks."""

_ATTRIBUTE = "moe_dist_class"


def mark(module: nn.Module, parameter_class: ParameterClass) -> None:
    """Marks every parameter of `module`."""
    for parameter in module.parameters():
        setattr(parameter, _ATTRIBUTE, parameter_class)


def class_of(parameter: nn.Parameter) -> ParameterClass:
    """What a parameter was marked as, or dense."""
    return getattr(parameter, _ATTRIBUTE, ParameterClass.DENSE)
