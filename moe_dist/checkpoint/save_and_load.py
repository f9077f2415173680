"""Saving and loading through `torch.distributed.checkpoint`."""

import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from moe_dist.checkpoint.manifest import Index, Manifest, read_index
from moe_dist.checkpoint.resharding_planner import ShardLoadPlanner, ShardSavePlanner
from moe_dist.checkpoint.sharded_tensor import ShardedTensor, State
from moe_dist.checkpoint.storage import ShardReader, ShardWriter
from moe_dist.errors import CheckpointError, OffloadError


def write_checkpoint(
    target: Path, manifest: Manifest, state: State, rank: int, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint and commit it to `target`; collective over `group`, whose first rank coordinates.

    Raises:
        CheckpointError: a rank could not write its part (raised on all ranks); an earlier checkpoint is untouched.
    """
    writer = ShardWriter(target, manifest, state, rank)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some callers are one process without a process group
            dcp.save(state, storage_writer=writer, planner=ShardSavePlanner(), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {target} could not be written: {_first_cause(error)}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {target} could not be written: {error.strerror or error}") from error


def read_checkpoint(checkpoint: Path, state: State, group: dist.ProcessGroup | None = None) -> None:
    """Fill the shards of `state` in place from a verified checkpoint; collective.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is damaged (raised on all ranks).
        OffloadError: a tier fails on any rank.
    """
    index = read_index(checkpoint)
    _require_fits(checkpoint, state, index)
    wanted = {name: state.get(name, _empty_state(index, name)) for name in index.tensors}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(
                wanted, storage_reader=ShardReader(checkpoint, index), planner=ShardLoadPlanner(), process_group=group
            )
    except CheckpointException as error:
        tier_failed = any(isinstance(cause, OffloadError) for cause, _ in error.failures.values())
        raise (OffloadError if tier_failed else CheckpointError)(_first_cause(error)) from error


def _require_fits(checkpoint: Path, state: State, index: Index) -> None:
    for name, tensor in state.items():
        stored = index.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"checkpoint {checkpoint} has no tensor {name}")
        if tuple(stored.shape) != tensor.shape:
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} has shape {tuple(stored.shape)}, the model needs {tensor.shape}"
            )


def _empty_state(index: Index, name: str) -> ShardedTensor:
    """Return a state with the names of all ranks, which torch requires even of a rank that needs none of a tensor."""
    tensor = index.tensors[name]
    return ShardedTensor(tuple(tensor.shape), tensor.torch_dtype)


def _first_cause(error: CheckpointException) -> str:
    """Return the failure of the lowest failed rank in one line."""
    rank, (cause, _) = min(error.failures.items())
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if isinstance(cause, CheckpointError) else f"rank {rank}: {text}"
