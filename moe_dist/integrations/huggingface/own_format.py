"""Names and keys of models that only our own class computes: feed-forward layers keep our names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.compression import long_axis
from moe_dist.config import RunConfig, WorldShape
from moe_dist.conversion.residual_exchange import STACKED
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.errors import CheckpointError
from moe_dist.integrations.huggingface.attention_keys import attention_keys
from moe_dist.integrations.huggingface.families import OUR_ARCHITECTURE
from moe_dist.integrations.huggingface.imported_tensors import LazyTensor, Tensors
from moe_dist.integrations.huggingface.source_folder import SourceFolder
from moe_dist.integrations.huggingface.tensor_links import LAYERS
from moe_dist.moe.quantized_experts import stored_sizes

MODELING = Path(__file__).with_name("modeling_moe_dist.py")
INNER = re.compile(rf"{re.escape(LAYERS)}\.(\d+)\.mlp\.inner\.(.+)")
"""Name of one of our parameters of a feed-forward layer."""
_STATE = ("expert_bias_E", "cluster_bias_G", "member_GN")
_PARTS = ("codes", "scales", "zeros")


def own_keys(config: RunConfig, quantized: bool) -> dict[str, Any]:
    """Return the keys of config.json for our own class."""
    if config.model.window_from:
        raise CheckpointError(
            f"model.window_from={config.model.window_from}: {OUR_ARCHITECTURE} has sliding windows in all layers or "
            "none: this run cannot be exported for transformers"
        )
    sections = {name: getattr(config, name).model_dump(mode="json") for name in ("model", "moe", "precision")}
    sections["moe"]["dense_hidden"] = config.moe.dense_width
    module = MODELING.stem
    return attention_keys(config.model) | {
        "sliding_window": config.model.window,
        "intermediate_size": 1,  # of the network of Llama that ours replaces
        "moe_dist": {**sections, "quantized": quantized},
        "auto_map": {
            "AutoConfig": f"{module}.MoeDistConfig",
            "AutoModelForCausalLM": f"{module}.{OUR_ARCHITECTURE}",
        },
    }


def own_sections(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a configuration that `own_keys` has written.

    Raises:
        CheckpointError: config.json lacks them.
    """
    found = hf.get("moe_dist")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), dict) for name in ("model", "moe", "precision")
    ):
        raise CheckpointError("config.json: moe_dist must hold the sections model, moe and precision")
    return {name: dict(found[name]) for name in ("model", "moe", "precision")}


def own_name(ours: str) -> str | None:
    """Return the exported name of a parameter of a feed-forward layer; None: it is not one."""
    match = INNER.fullmatch(ours)
    return f"model.layers.{match[1]}.mlp.{match[2]}" if match else None


def routing_state(
    config: RunConfig, placements: Iterable[ExpertPlacement], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return selection biases, and members of clusters, by their exported names."""
    state: dict[str, Tensor] = {}
    members = [torch.tensor(placement.members) for placement in placements]
    for layer in range(config.moe_layers if config.moe.layer_kind.routed else 0):
        prefix = f"model.layers.{config.moe.dense_layers + layer}.mlp."
        state[f"{prefix}expert_bias_E"] = biases["expert_bias_LE"][layer].clone()
        if members:
            state[f"{prefix}cluster_bias_G"] = biases["cluster_bias_LG"][layer].clone()
            state[f"{prefix}member_GN"] = members[layer]
    return state


def own_tensors(config: RunConfig, source: SourceFolder) -> Tensors:
    """Return the parameters of the feed-forward layers of an exported folder; quantized factors are unpacked."""
    tensors: Tensors = {}
    for name in sorted(source.names):
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(.+)", name)
        if match is None or match[2] in _STATE:
            continue
        leaf = match[2].rpartition(".")
        packed = leaf[2] in _PARTS and long_axis(leaf[0].rpartition(".")[2]) is not None
        if not packed:
            shape = source.shape(name)
            tensors[f"{LAYERS}.{match[1]}.mlp.inner.{match[2]}"] = LazyTensor(shape, partial(source.tensor, name))
        elif leaf[2] == "codes":
            tensors[f"{LAYERS}.{match[1]}.mlp.inner.{leaf[0]}"] = _factor(config, source, name.removesuffix(".codes"))
    return tensors


def _factor(config: RunConfig, source: SourceFolder, name: str) -> LazyTensor:
    """Return a quantized factor's values as they are stored."""
    like = stored_sizes(config, 1).experts.factors[STACKED[name.rpartition(".")[2]]]

    def read() -> Tensor:
        try:
            factor = like.with_parts({part: source.tensor(f"{name}.{part}")[None] for part in like.parts()})
        except ValueError as error:
            raise CheckpointError(f"{source.folder}: {name}: {error}") from error
        return factor.unpacked(torch.float32)[0]

    return LazyTensor(like.shape[1:], read)


def read_routing_state(config: RunConfig, source: SourceFolder) -> tuple[list[ExpertPlacement], dict[str, Tensor]]:
    """Return placements and selection biases of an exported folder (the inverse of `routing_state`).

    Raises:
        CheckpointError: a tensor is missing, or clusters do not hold each expert once.
    """
    moe, layers = config.moe, config.moe_layers
    expert_bias_LE, cluster_bias_LG = torch.zeros(layers, moe.experts), torch.zeros(layers, moe.clusters)
    placements = []
    for layer in range(layers if moe.layer_kind.routed else 0):
        prefix = f"model.layers.{moe.dense_layers + layer}.mlp."
        expert_bias_LE[layer] = source.tensor(f"{prefix}expert_bias_E")
        if moe.layer_kind.clustered:
            cluster_bias_LG[layer] = source.tensor(f"{prefix}cluster_bias_G")
            members = tuple(map(tuple, source.tensor(f"{prefix}member_GN").tolist()))
            if sorted(expert for cluster in members for expert in cluster) != list(range(moe.experts)):
                raise CheckpointError(
                    f"{source.folder}: {prefix}member_GN does not hold each of {moe.experts} experts once"
                )
            alone = ExpertPlacement.contiguous(moe.experts, moe.clusters, WorldShape(1, 1, 1))
            placements.append(replace(alone, members=members))
    return placements, {"expert_bias_LE": expert_bias_LE, "cluster_bias_LG": cluster_bias_LG}
