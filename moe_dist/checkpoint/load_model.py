"""A trained model, on any number of ranks."""

import torch

from moe_dist.checkpoint.manifest import read_index
from moe_dist.checkpoint.model_state import weights_of
from moe_dist.checkpoint.parts import hand_back, room_for
from moe_dist.checkpoint.placement_record import adopt_placements
from moe_dist.checkpoint.transfer import read_checkpoint
from moe_dist.checkpoint.weights import TrainedWeights
from moe_dist.model.language_model import LanguageModel
from moe_dist.topology.links import Links
from moe_dist.topology.mesh import Mesh


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
