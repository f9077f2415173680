"""Validation loss during training, the same for any number of ranks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import RunConfig
from moe_dist.data import Sequences, validation_batches
from moe_dist.distributed.init import RankInfo
from moe_dist.model.language_model import LanguageModel


class ValidationLoss(NamedTuple):
    """Loss in nats per target: the mean over a blend's sources by their `weight`, and that of each (blends only)."""

    mean: float
    by_source: Mapping[str, float]


def validation_loss(
    model: LanguageModel, held_out: Mapping[str, Sequences], config: RunConfig, micro: int, process: RankInfo
) -> ValidationLoss:
    """Return the mean loss over `train.eval_sequences` held-out sequences of each source; collective.

    Args:
        micro: number of sequences of a rank's micro-batch.
    """
    with model.evaluating():
        most, device = config.train.eval_sequences, process.device
        total_K2 = torch.stack([_totals(model, sequences, most, micro, device) for sequences in held_out.values()])
    dist.all_reduce(total_K2)
    losses = (total_K2[:, 0] / total_K2[:, 1]).tolist()
    if config.corpus.kind != "blend":
        return ValidationLoss(losses[0], {})
    return ValidationLoss(mean_of_sources(config, losses), dict(zip(held_out, losses, strict=True)))


def mean_of_sources(config: RunConfig, losses: Sequence[float]) -> float:
    """Return the mean of a blend's losses by the weights of its sources; of one source, its loss."""
    weights = [config.corpus.sources[name].weight for name in config.corpus.sources] or [1.0]
    if not any(weights):
        weights = [1.0] * len(losses)
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)


def _totals(model: LanguageModel, sequences: Sequences, most: int, micro: int, device: torch.device) -> Tensor:
    """Return this rank's sum of losses and of targets, float64 [2]."""
    mesh = model.context.mesh
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in validation_batches(sequences, most, mesh.in_attention.group, mesh.shape.sequence_groups, micro):
        tokens_BS = batch.tokens.to(device)
        loss_B = model.token_losses(tokens_BS).double().sum(dim=1) * mesh.shape.context  # of its part of each
        targets_B = (tokens_BS[:, 1:] >= 0).sum(dim=1) * model.stage.last
        weight_B = batch.weight.to(loss_B)
        total += torch.stack([(loss_B * weight_B).sum(), (targets_B * weight_B).sum()])
    return total
