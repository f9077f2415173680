"""Registration of our parameter classes as DeepSpeed experts, so that each is reduced over its own ranks only."""

from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.moe.parameter_class import REDUCED_OVER, class_of


class ExpertMarker(MoE):  # type: ignore[misc]
    """Module without parameters, by whose class DeepSpeed's engine detects that a model has experts."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
        """Do nothing: `register_groups` has registered the groups."""


class MarkedModel(nn.Module):
    """Model and expert marker as one module for DeepSpeed, without the parameters in `hidden`."""

    def __init__(self, model: nn.Module, num_experts: int, hidden: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self._hidden = set(hidden)
        self.model = model
        self.marker = ExpertMarker(num_experts) if has_experts(self) else None

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return `nn.Module.named_parameters` without the hidden ones; `parameters()` calls it too."""
        shown = super().named_parameters(*args, **kwargs)
        return ((name, parameter) for name, parameter in shown if parameter not in self._hidden)

    def forward(self, *args: object) -> object:
        """Call the model's forward pass."""
        return self.model(*args)


def has_experts(model: nn.Module) -> bool:
    """Return True if any parameter is reduced over a subset of the ranks (bases and experts)."""
    return any(class_of(parameter) in REDUCED_OVER for parameter in model.parameters())


def register_groups(model: nn.Module, mesh: Mesh) -> None:
    """Register the process groups of each parameter class with DeepSpeed, and mark each parameter with its group."""
    parallel = mesh.group(GroupKind.EXPERT_PARALLEL)
    size_name = f"ep_size_{parallel.size}"  # DeepSpeed parses the size from the name
    classes = [one for one, kind in REDUCED_OVER.items() if kind in mesh.groups]
    names = {parameter_class: f"{size_name}_{parameter_class.value}" for parameter_class in classes}
    for name in (size_name, *names.values()):
        groups._EXPERT_PARALLEL_GROUP[name] = parallel.handle
        groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(parallel.ranks)
    for parameter_class, name in names.items():
        reduced = mesh.group(REDUCED_OVER[parameter_class])
        groups._EXPERT_DATA_PARALLEL_GROUP[name] = reduced.handle
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(reduced.ranks)
    for parameter in model.parameters():
        if class_of(parameter) in REDUCED_OVER:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = names[class_of(parameter)]  # type: ignore[attr-defined]
