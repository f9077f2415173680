"""A trained model from a run's folder, on any number of ranks, for evaluation and export."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.checkpoint.find import Found, checked, is_checkpoint, newest_good
from moe_dist.checkpoint.fit import config_of
from moe_dist.checkpoint.manifest import Manifest, read_index
from moe_dist.checkpoint.model_state import weights_of
from moe_dist.checkpoint.parts import hand_back, room_for
from moe_dist.checkpoint.placement_record import adopt_placements
from moe_dist.checkpoint.transfer import read_checkpoint
from moe_dist.config import RunConfig
from moe_dist.errors import CheckpointError
from moe_dist.model.language_model import LanguageModel
from moe_dist.topology.links import Links
from moe_dist.topology.mesh import Mesh


@dataclass(frozen=True)
class TrainedWeights:
    """Where a run's weights are, what they say of themselves, and the configuration that they were trained with."""

    path: Path
    manifest: Manifest
    config: RunConfig


def find_weights(run: Path) -> TrainedWeights:
    """The weights of a run's end, or of its newest good checkpoint where it has not ended; or those at `run` itself.

    Collective where a process group exists. All files have been checked.

    Raises:
        CheckpointError: there are none, or every one is damaged.
    """
    found: Found | None = checked(run) if is_checkpoint(run) else newest_good(run, weights=True)
    if found is None:
        raise CheckpointError(
            f"{run} holds no weights: give the folder of a run that has ended or saved a checkpoint, such as runs/NAME"
        )
    return TrainedWeights(found.path, found.manifest, config_of(found.manifest))


def load_model(
    weights: TrainedWeights, mesh: Mesh, links: Links, device: torch.device, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The trained model, laid out over the ranks of `mesh`, which need not be as many as trained it; collective.

    Args:
        dtype: of the weights; None: what the run trained with (`train.precision`).

    Raises:
        CheckpointError: a tensor is missing or damaged.
        ConfigError: the experts cannot be laid out on that mesh.
    """
    model = LanguageModel(weights.config, weights.manifest.data.vocab_size, mesh, links)
    model = model.to_device(device).to(dtype or getattr(torch, weights.config.train.precision))
    adopt_placements(model, weights.manifest)
    parts = {"balance": model.context.balance}
    room = room_for(parts, read_index(weights.path), mesh.rank, mesh.shape.ranks)
    read_checkpoint(weights.path, {**weights_of(model), **room})
    hand_back(parts, room, weights.manifest)
    return model
