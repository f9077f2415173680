"""Losses on router logits; each is a sum over rows, so that ranks with unlike numbers of rows add up.

Shapes: R rows, E choices (experts or clusters), K chosen of them.
"""

import torch
from torch import Tensor


def balance_loss(logits_RE: Tensor, index_RK: Tensor) -> Tensor:
    """R times the auxiliary loss E * sum_e f_e P_e (Switch Transformer, eq. 4); R when perfectly balanced.

    f_e: share of the copies that went to e; P_e: mean probability of e. Both over the rows at hand, as is usual: the
    value depends on how a batch is divided into micro-batches and ranks.
    """
    index_C = index_RK.flatten()
    count_E = logits_RE.new_zeros(logits_RE.shape[1])
    count_E.scatter_add_(0, index_C, torch.ones_like(index_C, dtype=count_E.dtype))
    share_E = count_E / max(1, index_C.numel())
    return logits_RE.shape[1] * (share_E * logits_RE.softmax(dim=-1).sum(dim=0)).sum()


def z_loss(logits_RE: Tensor) -> Tensor:
    """Sum over rows of logsumexp(logits)^2, which keeps logits small (ST-MoE, eq. 5)."""
    return logits_RE.logsumexp(dim=-1).square().sum()
