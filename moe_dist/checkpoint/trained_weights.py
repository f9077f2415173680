"""Location of trained weights; needs no model."""

from dataclasses import dataclass
from pathlib import Path

from moe_dist.checkpoint.compatibility import config_of
from moe_dist.checkpoint.exported import open_exported
from moe_dist.checkpoint.find import ValidCheckpoint, checked, is_checkpoint, latest_valid_checkpoint
from moe_dist.checkpoint.manifest import Manifest
from moe_dist.config import RunConfig
from moe_dist.errors import CheckpointError


@dataclass(frozen=True)
class TrainedWeights:
    """Location of a run's weights, their manifest, and the configuration that they were trained with."""

    path: Path
    """Folder of a checkpoint, or a file of `moe-dist export`."""
    manifest: Manifest
    config: RunConfig
    stored: bool = False
    """True if clusters are quantized: a file of `moe-dist export --stored`."""


def find_weights(run: Path) -> TrainedWeights:
    """Find the weights at `run` itself, the final weights of a run, or its newest valid checkpoint.

    `run` may also be a file that `moe-dist export` wrote. Collective if a process group exists. All files of a
    checkpoint are verified.

    Raises:
        CheckpointError: there are none, or all are damaged.
    """
    if run.is_file():
        with open_exported(run) as file:
            manifest, stored = file.manifest(), file.stored
        return TrainedWeights(run, manifest, config_of(manifest), stored)
    found: ValidCheckpoint | None = checked(run) if is_checkpoint(run) else latest_valid_checkpoint(run, weights=True)
    if found is None:
        what = "holds no weights" if run.exists() else "does not exist"
        raise CheckpointError(
            f"{run} {what}: give the folder of a run that has finished or saved a checkpoint, such as runs/NAME"
        )
    return TrainedWeights(found.path, found.manifest, config_of(found.manifest))
