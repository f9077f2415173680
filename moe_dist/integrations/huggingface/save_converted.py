"""Folder of a converted model (`drop_in.py`) that transformers loads by the class of our exports."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.parameter_names import cluster_runs
from moe_dist.config import RunConfig
from moe_dist.distributed.mesh import GroupKind
from moe_dist.errors import ConfigError
from moe_dist.integrations.huggingface.drop_in import BatchFirst
from moe_dist.integrations.huggingface.families import OUR_ARCHITECTURE, OUR_MODEL_TYPE, family_of
from moe_dist.integrations.huggingface.own_format import MODELING, own_keys
from moe_dist.integrations.huggingface.source_folder import CONFIG, INDEX, WEIGHTS
from moe_dist.moe.clustered_moe import ClusteredMoE

KEPT = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that stay as they are."""


def save_converted(model: Any, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a converted model, which `from_pretrained` loads and `moe-dist import` reads; collective.

    Every rank of the layers' mesh calls it, with a folder that all of them see; each writes its own clusters.

    Args:
        model: converted model of transformers, without wrappers.
        tokenizer: its tokenizer, which is saved as well.

    Raises:
        ConfigError: the model was not converted, or its architecture is not known.
    """
    layers = {name: module.layer for name, module in model.named_modules() if isinstance(module, BatchFirst)}
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no clustered layers: call moe_dist.convert first")
    first = next(iter(layers.values()))
    config, mesh, folder = _config(model, first), first.context.mesh, Path(folder)
    files = _file_names(mesh.group(GroupKind.EXPERT_PARALLEL).size)
    number = mesh.index_in(GroupKind.EXPERT_PARALLEL)
    folder.mkdir(parents=True, exist_ok=True)
    common = _common_tensors(model, layers)
    if mesh.at.data == 0:
        own = {name: tensor for path, layer in layers.items() for name, tensor in _of_clusters(path, layer)}
        save_file(own | (common if number == 0 else {}), folder / files[number], {"format": "pt"})
    if mesh.rank == 0:
        where = dict.fromkeys(common, files[0]) | _files_of_clusters(layers, files)
        if len(files) > 1:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1) + "\n")
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        (folder / MODELING.name).write_bytes(MODELING.read_bytes())
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if mesh.shape.ranks > 1:
        dist.barrier()


def _config(model: Any, layer: ClusteredMoE) -> dict[str, Any]:
    """Return the content of config.json."""
    hf = model.config.to_dict() | {"architectures": [type(model).__name__]}
    sections = {"model": family_of(hf).sections(hf)["model"], "moe": layer.moe.model_dump(mode="json")}
    keys = own_keys(RunConfig.model_validate(sections), quantized=False)
    common = {"architectures": [OUR_ARCHITECTURE], "dtype": str(model.dtype).removeprefix("torch.")}
    return {"model_type": OUR_MODEL_TYPE, **keys, **common, **{key: hf.get(key) for key in KEPT}}


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _common_tensors(model: Any, layers: dict[str, ClusteredMoE]) -> dict[str, Tensor]:
    """Return what all ranks hold: everything but clusters, with routers and routing state by their exported names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        path, inside, leaf = name.rpartition(".layer.")
        if not inside or path not in layers:
            tensors[name] = tensor
        elif not leaf.startswith("clusters."):
            tensors[f"{path}.{leaf}"] = tensor
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _of_clusters(path: str, layer: ClusteredMoE) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of this rank's clusters; bases from the first shard alone."""
    for parameter, runs in cluster_runs(path, layer):
        for run in runs:
            if ".expert." in run.name or layer.context.mesh.at.shard == 0:
                yield run.name, parameter.detach().view(-1)[run.start : run.start + run.length].view(run.shape).clone()


def _files_of_clusters(layers: dict[str, ClusteredMoE], files: list[str]) -> dict[str, str]:
    """Return the file of each tensor of each cluster, of all ranks."""
    where: dict[str, str] = {}
    for path, layer in layers.items():
        placement, shards = layer.placement, layer.context.mesh.shape.shard
        leaves = {run.name.removeprefix(f"{path}.") for _, runs in cluster_runs(path, layer) for run in runs}
        bases = {leaf.split(".", 2)[2] for leaf in leaves if leaf.startswith("cluster.")}
        residuals = {leaf.split(".", 2)[2] for leaf in leaves if leaf.startswith("expert.")}
        for block in range(placement.blocks):
            for cluster in placement.clusters_of_block(block):
                where |= {f"{path}.cluster.{cluster}.{leaf}": files[block * shards] for leaf in bases}
                for shard in range(shards):
                    for expert in placement.experts_of(cluster, shard):
                        file = files[block * shards + shard]
                        where |= {f"{path}.expert.{expert}.{leaf}": file for leaf in residuals}
    return where
