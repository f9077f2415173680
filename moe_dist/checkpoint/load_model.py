"""Loading of a trained model on any number of ranks."""

from dataclasses import replace
from pathlib import Path

import torch

from moe_dist.checkpoint.exported import ExportedFile, open_exported
from moe_dist.checkpoint.manifest import read_index
from moe_dist.checkpoint.model_state import run_of, weights_of
from moe_dist.checkpoint.parameter_names import named_runs
from moe_dist.checkpoint.placement_record import adopt_placements
from moe_dist.checkpoint.quantized_tensors import read_quantized_cluster
from moe_dist.checkpoint.save_and_load import read_checkpoint
from moe_dist.checkpoint.stateful import allocate_like, load_state
from moe_dist.checkpoint.trained_weights import TrainedWeights, find_weights
from moe_dist.config import RunConfig, WorldConfig, resolve_world
from moe_dist.distributed.collective_errors import raise_on_all_ranks
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.memory.quantized_clusters import QuantizedClusterMemory
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.quantized_experts import QuantizedClusterExperts, stored_sizes


def load_model(
    weights: TrainedWeights | str | Path,
    mesh: Mesh | None = None,
    links: Links | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory: QuantizedClusterMemory | None = None,
) -> LanguageModel:
    """Load a trained model, laid out over the ranks of `mesh`; their number may differ from training. Collective.

    `load_model("runs/demo")` is enough: under torchrun it uses all ranks, else this process.

    Clusters that are quantized in an exported file stay quantized in memory, and cannot be trained.

    Args:
        weights: what `find_weights` has found, or the folder of a run or a checkpoint, or an exported file.
        mesh: None: all ranks, laid out as a run of that number of ranks would be. A process without torch.distributed
            initializes it, for itself or as a rank of its launcher.
        links: None: as found between the ranks.
        device: None: this rank's GPU if there is one, else the CPU.
        dtype: type of the weights; None: the run's `train.precision`.
        memory: tiers for quantized clusters; None: keep them on the device.

    Raises:
        CheckpointError: a tensor is missing or damaged.
        ConfigError: the experts do not divide over the mesh, or a memory budget is too small for a cluster.
        OffloadError: a memory tier fails.
    """
    if not isinstance(weights, TrainedWeights):
        weights = find_weights(Path(weights))
    if mesh is None or device is None or links is None:
        process = init_distributed(weights.config.world)
        if mesh is None:
            weights = replace(weights, config=_on_any_ranks(weights.config))
            mesh = Mesh.over_world(resolve_world(weights.config, process.ranks))
        device, links = device or process.device, links or Links.discover(process.device)
    model = LanguageModel(weights.config, weights.manifest.data.vocab_size, mesh, links, quantized=weights.stored)
    model = model.to_device(device).to(dtype or getattr(torch, weights.config.train.precision))
    adopt_placements(model, weights.manifest)
    if weights.path.is_file():
        with raise_on_all_ranks(), open_exported(weights.path) as file:
            if weights.stored:
                _read_quantized_clusters(model, file, device, memory)
            _read_exported(model, file)
        return model
    parts = {"balance": model.context.balance}
    room = allocate_like(parts, read_index(weights.path), mesh.rank, mesh.shape.ranks)
    read_checkpoint(weights.path, {**weights_of(model), **room})
    load_state(parts, room, weights.manifest)
    return model


def _on_any_ranks(config: RunConfig) -> RunConfig:
    """Return the configuration without the layout that it was trained with."""
    return config.model_copy(update={"world": WorldConfig(backend=config.world.backend)})


def _read_exported(model: LanguageModel, file: ExportedFile) -> None:
    for name, bias in model.context.balance.state_dict().items():
        bias.copy_(file.read(f"balance.{name}", tuple(bias.shape)))
    for parameter, runs in named_runs(model).items():
        shapes = {run.name: run.shape for run in runs}  # a tensor that is divided by columns has a run for each row
        read = {name: file.read(name, shape).flatten() for name, shape in shapes.items()}
        for run in runs:
            run_of(parameter, run).copy_(read[run.name][run.first : run.first + run.length])


def _read_quantized_clusters(
    model: LanguageModel, file: ExportedFile, device: torch.device, memory: QuantizedClusterMemory | None
) -> None:
    config, at = model.config, model.context.mesh.at
    dtype = next(model.parameters()).dtype
    paths = {module: path for path, module in model.named_modules()}
    if memory is not None:
        memory.describe = model.describe_block
    for layer in model.clustered_layers():
        like = stored_sizes(config, layer.placement.slots_per_shard)
        for local, cluster in enumerate(layer.placement.clusters_of_block(at.cluster)):
            experts = layer.placement.experts_of(cluster, at.shard)
            packed = read_quantized_cluster(like, paths[layer], cluster, experts, file.tensor)
            part = QuantizedClusterExperts(packed, dtype, config.moe.backend)
            if memory is None:
                part.to(device)
            else:
                part.keep_in(memory, layer.layer, local)
            layer.clusters.append(part)
