"""Small checkpoints, written by one process without a process group."""

from pathlib import Path

import torch

from moe_dist.checkpoint.manifest import DataRecord, Manifest
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.sharded_tensor import ShardedTensor, State
from moe_dist.checkpoint.store import step_folder
from moe_dist.config import RunConfig

DATA = DataRecord(train_checksum=1, validation_checksum=2, vocab_size=300, next_step=0)


def manifest(step: int = 1, config: RunConfig | None = None) -> Manifest:
    return Manifest(
        kind="training", step=step, ranks=1, config=(config or RunConfig()).model_dump(mode="json"), data=DATA
    )


def state() -> State:
    return {
        "weight/a": ShardedTensor.whole(torch.arange(12.0).view(3, 4)),
        "weight/b": ShardedTensor.whole(torch.tensor([7, -1])),
    }


def saved(run: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps in the folder of a run, in the order given."""
    folders = [step_folder(run, step) for step in steps]
    for step, folder in zip(steps, folders, strict=True):
        write_checkpoint(folder, manifest(step), state(), rank=0)
    return folders
