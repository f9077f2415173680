"""Names of parameters that are independent of the layout: experts and clusters by number, not by rank or slot.

gpt.decoder.layers.0.mlp.inner.expert.17.in_u_DR      an expert's own weights
gpt.decoder.layers.0.mlp.inner.cluster.2.w_in_DH      a cluster's base
gpt.embedding.word_embeddings.weight                  any other parameter, by its name in the module
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

from moe_dist.distributed.mesh import Mesh
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.megatron_tensor_parallel import divided_dimension
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.hidden_slices import HiddenSlice
from moe_dist.moe.parameter_class import ParameterClass, class_of
from moe_dist.moe.quantized_experts import QuantizedClusterExperts
from moe_dist.moe.standard_moe import StandardMoE


@dataclass(frozen=True)
class NamedRun:
    """Run of a parameter's elements that is a named tensor, or a run of one.

    Attributes:
        shape: shape of the whole named tensor.
        start: first element, of the flattened parameter.
        first: first element, of the flattened named tensor.
        part: number of elements; None: the whole named tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int = 0
    first: int = 0
    part: int | None = None

    @property
    def length(self) -> int:
        """Number of elements."""
        return prod(self.shape) if self.part is None else self.part


def named_runs(model: LanguageModel) -> dict[nn.Parameter, list[NamedRun]]:
    """Return every parameter of the model on this rank as runs that cover it, in order."""
    runs: dict[nn.Parameter, list[NamedRun]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ClusteredMoE):
            runs.update(cluster_runs(path, module))
        elif isinstance(module, StandardMoE):
            runs.update(_of_standard_experts(path, module))
    for name, parameter in model.named_parameters():
        if class_of(parameter) is ParameterClass.TENSOR:
            runs[parameter] = list(_of_tensor_parallel(name, parameter, model.context.mesh))
        runs.setdefault(parameter, [NamedRun(name, tuple(parameter.shape))])
    return runs


def _of_tensor_parallel(name: str, parameter: nn.Parameter, mesh: Mesh) -> Iterator[NamedRun]:
    """Yield the runs of a parameter that is divided over the tensor group: one, or one a row if columns are divided."""
    dimension, shape = divided_dimension(parameter), list(parameter.shape)
    shape[dimension] *= mesh.shape.tensor
    whole, rows = prod(shape[dimension:]), prod(shape[:dimension])
    part, own = whole // mesh.shape.tensor, mesh.in_attention.tensor
    for row in range(rows):
        yield NamedRun(name, tuple(shape), row * part, row * whole + own * part, part)


def cluster_runs(path: str, layer: ClusteredMoE) -> Iterator[tuple[nn.Parameter, list[NamedRun]]]:
    """Yield the parameters of this rank's clusters of a layer, as runs whose names begin with `path`."""
    placement, at = layer.placement, layer.context.mesh.at
    for cluster, held in zip(placement.clusters_of_block(at.cluster), layer.clusters, strict=True):
        if isinstance(held, QuantizedClusterExperts):
            continue  # it has no parameters
        assert isinstance(held, ClusteredExperts)
        part = held.residuals.part
        for name, parameter in held.base.named_parameters():
            yield parameter, list(_runs_of_slice(f"{path}.cluster.{cluster}", name, tuple(parameter.shape), 0, part))
        experts = placement.experts_of(cluster, at.shard)
        for name, parameter in held.residuals.named_parameters():
            shape, one = tuple(parameter.shape[1:]), parameter[0].numel()
            leaf = name.replace("_N", "_", 1)  # without the axis over experts: in_u_NDR stacks their in_u_DR
            runs = (_runs_of_slice(f"{path}.expert.{e}", leaf, shape, n * one, part) for n, e in enumerate(experts))
            yield parameter, [run for of_expert in runs for run in of_expert]


def _runs_of_slice(owner: str, leaf: str, shape: tuple[int, ...], start: int, part: HiddenSlice) -> Iterator[NamedRun]:
    """Yield the runs of a base's or an expert's tensor; several if it is sliced along its last dimension.

    Args:
        shape: shape of the tensor on this rank.
        start: its first element in the parameter.
    """
    whole = part.whole_shape(leaf, shape)
    for own, first, length in part.runs(leaf, shape):
        yield NamedRun(f"{owner}.{leaf}", whole, start + own, first, None if whole == shape else length)


def _of_standard_experts(path: str, layer: StandardMoE) -> Iterator[tuple[nn.Parameter, list[NamedRun]]]:
    for name in ("w_in", "w_out"):
        for local, parameter in enumerate(getattr(layer.experts, name)):
            yield parameter, [NamedRun(f"{path}.expert.{layer.first_expert + local}.{name}", tuple(parameter.shape))]
