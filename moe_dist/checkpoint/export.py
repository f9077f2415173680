"""Export of a trained model's weights to one safetensors file, under names that do not depend on the layout."""

import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.manifest import WEIGHT, Index, read_index
from moe_dist.checkpoint.quantized_tensors import dtype_to_quantize, is_of_cluster, quantized_tensors_of
from moe_dist.checkpoint.save_and_load import read_checkpoint
from moe_dist.checkpoint.sharded_tensor import ShardedTensor, State
from moe_dist.checkpoint.trained_weights import TrainedWeights
from moe_dist.compression import StorageFormat
from moe_dist.config import RunConfig
from moe_dist.errors import CheckpointError
from moe_dist.moe.quantized_experts import storage_format

PREFIX = f"{WEIGHT}/"
BALANCE = "part/balance/"
"""Prefix of selection biases in the file (`balance.<name>`); routing depends on them."""


def export_weights(
    weights: TrainedWeights, file: Path, dtype: torch.dtype | None = None, *, stored: bool = False
) -> int:
    """Write all weights to `file`, atomically, and return their number. Runs in one process.

    The file's metadata holds `config`, `placements` and `data` as JSON, the step, and whether clusters are quantized.

    Args:
        weights: weights of a run or a checkpoint.
        dtype: type of the values; None: float32, or with `stored` the type that the run trained with.
        stored: quantize clusters as the run's `precision` section configures.

    Raises:
        CheckpointError: the weights are an exported file, there are no clusters to quantize, or the file cannot be
            written.
    """
    if weights.path.is_file():
        raise CheckpointError(f"{weights.path} is an exported file already: give its run or checkpoint")
    form = quantized_format(weights) if stored else None
    index = read_index(weights.path)
    state = _room(index, dtype, weights.config if stored else None)
    read_checkpoint(weights.path, state)
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(PREFIX) if key.startswith(PREFIX) else f"balance.{key.removeprefix(BALANCE)}"
        value = tensor.shards[0].values.view(tensor.shape)
        tensors |= {name: value} if form is None else quantized_tensors_of(name, value, form)
    _write(file, tensors, _metadata(weights, stored))
    return sum(tensor.numel for key, tensor in state.items() if key.startswith(PREFIX))


def quantized_format(weights: TrainedWeights) -> StorageFormat:
    """Return the format of quantized clusters.

    Raises:
        CheckpointError: the run has no clusters that can be stored so.
    """
    if weights.config.moe.two_level_base:
        raise CheckpointError(
            f"{weights.path}: moe.base={weights.config.moe.base} cannot be stored in few bits yet: export it without "
            "--stored"
        )
    if not weights.config.moe.layer_kind.clustered:
        raise CheckpointError(
            f"{weights.path}: only clustered experts can be quantized, not moe.kind={weights.config.moe.kind}"
        )
    return storage_format(weights.config)


def _room(index: Index, dtype: torch.dtype | None, stored: RunConfig | None) -> State:
    """Return empty tensors to read into, biases in their own type.

    Args:
        dtype: type of the others; None: as they are, or with `stored` the type of training.
        stored: configuration of the run if clusters are to be quantized.
    """
    state: State = {}
    for key, tensor in index.tensors.items():
        if not key.startswith((PREFIX, BALANCE)):
            continue
        wanted = tensor.torch_dtype
        if key.startswith(PREFIX):
            trained = None if stored is None else dtype_to_quantize(key, stored)
            wanted = (trained if is_of_cluster(key) else None) or dtype or trained or wanted
        state[key] = ShardedTensor.whole(torch.empty(tensor.shape, dtype=wanted))
    return state


def _metadata(weights: TrainedWeights, stored: bool) -> dict[str, str]:
    manifest = weights.manifest
    return {
        "format": "pt",
        "step": str(manifest.step),
        "config": json.dumps(manifest.config),
        "placements": json.dumps([record.model_dump() for record in manifest.placements]),
        "data": json.dumps(manifest.data.model_dump()),
        "stored": json.dumps(stored),
    }


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = file.with_name(f".{file.name}.part")
    try:
        partial.touch()
        readable_by = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        partial.chmod(readable_by)  # safetensors creates files that only their owner can read
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{file}: cannot be written: {reason}") from error
