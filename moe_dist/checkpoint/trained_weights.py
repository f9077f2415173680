"""Trained weights: where they are; no model is needed to know it."""

from dataclasses import dataclass
from pathlib import Path

from moe_dist.checkpoint.compatibility import config_of
from moe_dist.checkpoint.exported import open_exported
from moe_dist.checkpoint.find import Found, checked, is_checkpoint, latest_valid_checkpoint
from moe_dist.checkpoint.manifest import Manifest
from moe_dist.config import RunConfig
from moe_dist.errors import CheckpointError


@dataclass(frozen=True)
class TrainedWeights:
    """Where a run's weights are, what they say of themselves, and the configuration that they were trained with."""

    path: Path
    """The folder of a checkpoint, or a file of `moe-dist export`."""
    manifest: Manifest
    config: RunConfig
    stored: bool = False
    """Clusters are in few bits: it is a file of `moe-dist export --stored`."""


def find_weights(run: Path) -> TrainedWeights:
    """The weights of a run's end, or of its newest good checkpoint where it has not ended; or those at `run` itself.

    `run` may also be a file that `moe-dist export` wrote. Collective where a process group exists. All files of a
    checkpoint have been checked.

    Raises:
        CheckpointError: there are none, or every one is damaged.
    """
    if run.is_file():
        with open_exported(run) as file:
            manifest, stored = file.manifest(), file.stored
        return TrainedWeights(run, manifest, config_of(manifest), stored)
    found: Found | None = checked(run) if is_checkpoint(run) else latest_valid_checkpoint(run, weights=True)
    if found is None:
        what = "holds no weights" if run.exists() else "does not exist"
        raise CheckpointError(
            f"{run} {what}: give the folder of a run that has ended or saved a checkpoint, such as runs/NAME"
        )
    return TrainedWeights(found.path, found.manifest, config_of(found.manifest))
