"""Makes DeepSpeed treat our parameter classes as its experts: reduced over their own ranks and no other."""

from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.moe.parameter_class import REDUCED_OVER, class_of


class ExpertMarker(MoE):  # type: ignore[misc]
    """A parameterless module of the class that DeepSpeed's engine looks for to learn that a model has experts."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
        """Nothing to do: the groups are registered by `register_groups`."""


class MarkedModel(nn.Module):
    """The model beside the marker, as one module for DeepSpeed, which does not see the parameters `hidden` from it."""

    def __init__(self, model: nn.Module, num_experts: int, hidden: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self._hidden = set(hidden)
        self.model = model
        self.marker = ExpertMarker(num_experts) if has_experts(self) else None

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in `nn.Module`, without the hidden ones; `parameters()` leaves them out, too."""
        shown = super().named_parameters(*args, **kwargs)
        return ((name, parameter) for name, parameter in shown if parameter not in self._hidden)

    def forward(self, *args: object) -> object:
        """The model's own forward pass."""
        return self.model(*args)


def has_experts(model: nn.Module) -> bool:
    """Whether some of its parameters are reduced over fewer than all ranks: a cluster's base or an expert's own."""
    return any(class_of(parameter) in REDUCED_OVER for parameter in model.parameters())


def register_groups(model: nn.Module, mesh: Mesh) -> None:
    """Names the groups over which each class is reduced, and each parameter's class, in DeepSpeed's terms."""
    parallel = mesh.group(GroupKind.EXPERT_PARALLEL)
    size_name = f"ep_size_{parallel.size}"  # DeepSpeed reads the size out of the name
    names = {parameter_class: f"{size_name}_{parameter_class.value}" for parameter_class in REDUCED_OVER}
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
