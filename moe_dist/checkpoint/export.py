"""A trained model's weights as one safetensors file, under names that do not depend on the layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_dist.checkpoint.manifest import WEIGHT, read_index
from moe_dist.checkpoint.shards import ShardedTensor
from moe_dist.checkpoint.transfer import read_checkpoint
from moe_dist.checkpoint.weights import TrainedWeights
from moe_dist.errors import CheckpointError

PREFIX = f"{WEIGHT}/"


def export_weights(weights: TrainedWeights, file: Path, dtype: torch.dtype | None = None) -> int:
    """Writes all weights to `file`, whole or not at all, and returns their number; in one process.

    The file's metadata holds `config` and `placements` as JSON, and the step.

    Args:
        dtype: None: float32, as they are kept.

    Raises:
        CheckpointError: the file cannot be written.
    """
    index = read_index(weights.path)
    state = {
        name: ShardedTensor.whole(torch.empty(tensor.shape, dtype=dtype or tensor.torch_dtype))
        for name, tensor in index.tensors.items()
        if name.startswith(PREFIX)
    }
    read_checkpoint(weights.path, state)
    tensors = {name.removeprefix(PREFIX): tensor.shards[0].values.view(tensor.shape) for name, tensor in state.items()}
    manifest = weights.manifest
    placements = [record.model_dump() for record in manifest.placements]
    metadata = {
        "format": "pt",
        "step": str(manifest.step),
        "config": json.dumps(manifest.config),
        "placements": json.dumps(placements),
    }
    partial = file.with_name(f".{file.name}.part")
    try:
        partial.touch()
        readable_by = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        partial.chmod(readable_by)  # safetensors lets only its user read it
        partial.replace(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return sum(tensor.numel() for tensor in tensors.values())
