"""Tensors of an imported run, each computed when it is written: direct copies, and dense networks as experts.

Shapes: D hidden, E experts, F expert hidden, H = 2 F.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.compression import ClusterWeights, init_residual
from moe_dist.config import RunConfig, WorldShape
from moe_dist.conversion.residual_exchange import STACKED
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.integrations.huggingface.family import Family
from moe_dist.integrations.huggingface.source_folder import SourceFolder
from moe_dist.integrations.huggingface.tensor_links import LAYERS, Shape, TensorLink, feed_forward_links, links_of
from moe_dist.moe.init_generator import generator
from moe_dist.moe.router import Router


class ImportedModel(NamedTuple):
    """Configuration that computes what a checkpoint does, its family (None: our own), and rows of its embedding."""

    config: RunConfig
    family: Family | None
    vocab_size: int


class LazyTensor(NamedTuple):
    """Shape of a tensor, and the function that returns its values."""

    shape: Shape
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, value: Tensor) -> "LazyTensor":
        """Return a tensor that is in memory already."""
        return cls(tuple(value.shape), lambda: value)


Tensors = dict[str, LazyTensor]
"""Tensors by the names of our parameters."""


class ConvertedModel(NamedTuple):
    """Model of a run to be written.

    Attributes:
        placements: clusters of each layer; empty unless experts are clustered.
        output_errors: relative error of each expert's output on held-out tokens, by layer; empty if not compressed.
        biases: selection biases by the names of `BalanceState.state_dict`; zero where missing.
    """

    tensors: Tensors
    placements: Sequence[ExpertPlacement] = ()
    output_errors: Sequence[Sequence[float]] = ()
    biases: Mapping[str, Tensor] = MappingProxyType({})


def copied(links: Iterable[TensorLink], source: SourceFolder) -> Tensors:
    """Return parameters with the values of a checkpoint."""
    return {link.ours: LazyTensor(link.shape, partial(read_link, link, source)) for link in links}


def selection_biases(plain: ImportedModel, source: SourceFolder) -> dict[str, Tensor]:
    """Return the selection biases of a checkpoint by the names of `BalanceState.state_dict`; empty: it has none.

    Raises:
        CheckpointError: one has another shape.
    """
    if plain.family is None or plain.family.experts is None or plain.family.selection_bias is None:
        return {}
    moe, leaf = plain.config.moe, f"{plain.family.experts.block}.{plain.family.selection_bias}"
    names = [f"model.layers.{layer}.{leaf}" for layer in range(moe.dense_layers, plain.config.model.layers)]
    source.require(dict.fromkeys(names, (moe.experts,)))
    return {"expert_bias_LE": torch.stack([source.tensor(name).float() for name in names])}


def read_link(link: TensorLink, source: SourceFolder) -> Tensor:
    """Read one of our parameters, float32."""
    return link.join([source.tensor(name).float() for name in link.theirs])


def upcycled(config: RunConfig, plain: ImportedModel, source: SourceFolder, noise: float) -> ConvertedModel:
    """Return a dense model with each network as experts, which all compute what it does.

    A cluster's base is the network, and residuals start at zero; standard experts are copies.

    Args:
        plain: the dense model.
        noise: standard deviation of the noise on standard experts, as a share of that of each matrix.
    """
    assert plain.family is not None, "models of our own class are not upcycled"
    tensors = copied(links_of(plain.config, plain.vocab_size, None), source)
    for layer in range(config.model.layers):
        network = list(copied(feed_forward_links(plain.config, plain.family, layer), source).values())
        prefix = f"{LAYERS}.{layer}.mlp.inner."
        tensors[f"{prefix}router.weight_ED"] = _router(config, layer)
        if config.moe.layer_kind.clustered:
            tensors |= _clusters(config, layer, prefix, network)
        else:
            tensors |= _copies(config, layer, prefix, network, noise)
    if not config.moe.layer_kind.clustered:
        return ConvertedModel(tensors)
    placement = ExpertPlacement.contiguous(config.moe.experts, config.moe.clusters, WorldShape(1, 1, 1))
    return ConvertedModel(tensors, [placement] * config.model.layers)


def _router(config: RunConfig, layer: int) -> LazyTensor:
    moe, model = config.moe, config.model

    def read() -> Tensor:
        return Router.of_experts(layer, moe.experts, model, config.seed).weight_ED.detach()

    return LazyTensor((moe.experts, model.hidden_size), read)


def _clusters(config: RunConfig, layer: int, prefix: str, network: list[LazyTensor]) -> Tensors:
    model, moe = config.model, config.moe
    tensors: Tensors = {}
    for cluster in range(moe.clusters):
        for name, matrix in zip(("w_in_DH", "w_out_FD"), network, strict=True):
            tensors[f"{prefix}cluster.{cluster}.{name}"] = matrix

    def read(expert: int, name: str) -> Tensor:
        draw = generator(config.seed, layer, "residual", expert)
        drawn = init_residual(model.hidden_size, moe.expert_hidden, moe.rank, moe.expert_vectors, draw)
        for right in (drawn.in_v_RH, drawn.out_v_RD):
            right.zero_()
        value: Tensor = getattr(drawn, name)
        return value

    like = ClusterWeights.without_values(
        1, model.hidden_size, moe.expert_hidden, moe.rank, vectors=moe.expert_vectors, dtype=torch.float32
    )
    for name, stacked in STACKED.items():
        value = getattr(like, stacked)
        for expert in range(moe.experts if value is not None else 0):
            lazy = LazyTensor(tuple(value.shape[1:]), partial(read, expert, name))
            tensors[f"{prefix}expert.{expert}.{name}"] = lazy
    return tensors


def _copies(config: RunConfig, layer: int, prefix: str, network: list[LazyTensor], noise: float) -> Tensors:
    tensors: Tensors = {}
    for expert in range(config.moe.experts):
        for name, matrix in zip(("w_in", "w_out"), network, strict=True):

            def read(expert: int = expert, name: str = name, matrix: LazyTensor = matrix) -> Tensor:
                weight = matrix.read()
                draw = generator(config.seed, layer, f"noise on {name}", expert)
                return weight + torch.randn(weight.shape, generator=draw) * (noise * weight.std())

            tensors[f"{prefix}expert.{expert}.{name}"] = LazyTensor(matrix.shape, read)
    return tensors
