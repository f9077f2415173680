"""Validation loss during training, the same for any number of ranks."""

import torch
import torch.distributed as dist

from moe_dist.config import RunConfig
from moe_dist.data import TokenFile, validation_batches
from moe_dist.distributed.init import RankInfo
from moe_dist.model.language_model import LanguageModel


def validation_loss(model: LanguageModel, tokens: TokenFile, config: RunConfig, micro: int, process: RankInfo) -> float:
    """Return the mean loss over `train.eval_sequences` held-out sequences, nats per target; collective.

    Args:
        micro: number of sequences of a rank's micro-batch.
    """
    total = torch.zeros(2, dtype=torch.float64, device=process.device)
    length, most = config.model.sequence_length, config.train.eval_sequences
    mesh = model.context.mesh
    group, groups = mesh.in_attention.group, mesh.shape.sequence_groups
    with model.evaluating():
        for batch in validation_batches(tokens, length, most, group, groups, micro):
            tokens_BS = batch.tokens.to(process.device)
            loss_B = model.token_losses(tokens_BS).double().sum(dim=1) * mesh.shape.context  # of its part of each
            targets_B = (tokens_BS[:, 1:] >= 0).sum(dim=1) * model.stage.last
            weight_B = batch.weight.to(loss_B)
            total += torch.stack([(loss_B * weight_B).sum(), (targets_B * weight_B).sum()])
    dist.all_reduce(total)
    return float(total[0] / total[1])
