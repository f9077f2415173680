"""Export of a trained model's weights to one safetensors file, under names that do not depend on the layout."""

import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.manifest import WEIGHT, Index, read_index
from moe_dist.checkpoint.quantized_tensors import is_of_cluster, stored_tensors
from moe_dist.checkpoint.save_and_load import read_checkpoint
from moe_dist.checkpoint.sharded_tensor import ShardedTensor, State
from moe_dist.checkpoint.trained_weights import TrainedWeights
from moe_dist.compression import StorageFormat
from moe_dist.errors import CheckpointError
from moe_dist.moe.quantized_experts import storage_format

PREFIX = f"{WEIGHT}/"
BALANCE = "part/balance/"
"""Prefix of selection biases in the file (`balance.<name>`); routing depends on them."""


def export_weights(
    weights: TrainedWeights, file: Path, dtype: torch.dtype | None = None, *, stored: bool = False
) -> int:
    """Write all weights to `file`, atomically, and return their number. Runs in one process.

    The file's metadata holds `config`, `placements` and `data` as JSON, the step, and whether clusters are stored.

    Args:
        weights: of a run or a checkpoint.
        dtype: None: float32, as they are kept; where clusters are stored, what the run trained with.
        stored: clusters in the form of the run's `precision` section: factors in few bits, bases in their type.

    Raises:
        CheckpointError: the weights are those of an exported file, there are no clusters to be stored, or the file
            cannot be written.
    """
    if weights.path.is_file():
        raise CheckpointError(f"{weights.path} is an exported file already: give the run or checkpoint that it is from")
    form = _form(weights) if stored else None
    trained = getattr(torch, weights.config.train.precision)
    index = read_index(weights.path)
    state = _room(index, dtype or (trained if stored else None), None if form is None else trained)
    read_checkpoint(weights.path, state)
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, value = _name(key), tensor.shards[0].values.view(tensor.shape)
        tensors |= {name: value} if form is None else stored_tensors(name, value, form)
    _write(file, tensors, _metadata(weights, stored))
    return sum(tensor.numel for key, tensor in state.items() if key.startswith(PREFIX))


def _form(weights: TrainedWeights) -> StorageFormat:
    if weights.config.moe.kind != "clustered":
        raise CheckpointError(
            f"{weights.path}: only clustered experts have factors to store in few bits, not "
            f"moe.kind={weights.config.moe.kind}"
        )
    return storage_format(weights.config)


def _room(index: Index, dtype: torch.dtype | None, of_clusters: torch.dtype | None) -> State:
    """Return empty tensors to read into: those that are quantized in the training type, biases as they are."""
    state: State = {}
    for key, tensor in index.tensors.items():
        if not key.startswith((PREFIX, BALANCE)):
            continue
        wanted = tensor.torch_dtype
        if key.startswith(PREFIX):
            wanted = (of_clusters if is_of_cluster(key) else None) or dtype or wanted
        state[key] = ShardedTensor.whole(torch.empty(tensor.shape, dtype=wanted))
    return state


def _name(key: str) -> str:
    return key.removeprefix(PREFIX) if key.startswith(PREFIX) else f"balance.{key.removeprefix(BALANCE)}"


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
        partial.chmod(readable_by)  # safetensors lets only its user read it
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{file}: cannot be written: {reason}") from error
