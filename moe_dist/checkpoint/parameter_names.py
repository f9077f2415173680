"""Names of parameters that are independent of the layout: experts and clusters by number, not by rank or slot.

gpt.decoder.layers.0.mlp.inner.expert.17.in_u_DR      an expert's own weights
gpt.decoder.layers.0.mlp.inner.cluster.2.w_in_DH      a cluster's base
gpt.embedding.word_embeddings.weight                  any other parameter, by its name in the module
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.quantized_experts import QuantizedClusterExperts
from moe_dist.moe.standard_moe import StandardMoE


@dataclass(frozen=True)
class NamedRun:
    """Part of a parameter with a name of its own, from element `start` of the flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int = 0


def named_runs(model: LanguageModel) -> dict[nn.Parameter, list[NamedRun]]:
    """Yield every parameter of the model on this rank as runs that cover it, in order."""
    runs: dict[nn.Parameter, list[NamedRun]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ClusteredMoE):
            runs.update(cluster_runs(path, module))
        elif isinstance(module, StandardMoE):
            runs.update(_of_standard_experts(path, module))
    for name, parameter in model.named_parameters():
        runs.setdefault(parameter, [NamedRun(name, tuple(parameter.shape))])
    return runs


def cluster_runs(path: str, layer: ClusteredMoE) -> Iterator[tuple[nn.Parameter, list[NamedRun]]]:
    """Yield the parameters of this rank's clusters of a layer, as runs whose names begin with `path`."""
    placement, at = layer.placement, layer.context.mesh.at
    for cluster, held in zip(placement.clusters_of_block(at.cluster), layer.clusters, strict=True):
        if isinstance(held, QuantizedClusterExperts):
            continue  # it has no parameters
        assert isinstance(held, ClusteredExperts)
        for name, parameter in held.base.named_parameters():
            yield parameter, [NamedRun(f"{path}.cluster.{cluster}.{name}", tuple(parameter.shape))]
        experts = placement.experts_of(cluster, at.shard)
        for name, parameter in held.residuals.named_parameters():
            shape, one = tuple(parameter.shape[1:]), parameter[0].numel()
            leaf = name.replace("_N", "_", 1)  # without the axis over experts: in_u_NDR stacks their in_u_DR
            yield (
                parameter,
                [NamedRun(f"{path}.expert.{e}.{leaf}", shape, slot * one) for slot, e in enumerate(experts)],
            )


def _of_standard_experts(path: str, layer: StandardMoE) -> Iterator[tuple[nn.Parameter, list[NamedRun]]]:
    for name in ("w_in", "w_out"):
        for local, parameter in enumerate(getattr(layer.experts, name)):
            yield parameter, [NamedRun(f"{path}.expert.{layer.first_expert + local}.{name}", tuple(parameter.shape))]
