"""Losses on router logits; each is a sum over rows, so that ranks with different numbers of rows can be added.

Shapes: R rows, E choices (experts or clusters), K chosen of them.
"""

import torch
from torch import Tensor


def balance_loss(logits_RE: Tensor, index_RK: Tensor) -> Tensor:
    """Return R times the auxiliary loss E * sum_e f_e P_e (Switch Transformer, eq. 4); R if perfectly balanced.

    f_e: share of the copies that choose e; P_e: mean probability of e. Both are taken over the given rows, as is usual,
    so the value depends on the division of a batch into micro-batches and ranks.
    """
    index_C = index_RK.flatten()
    count_E = logits_RE.new_zeros(logits_RE.shape[1])
    count_E.scatter_add_(0, index_C, torch.ones_like(index_C, dtype=count_E.dtype))
    share_E = count_E / max(1, index_C.numel())
    return logits_RE.shape[1] * (share_E * logits_RE.softmax(dim=-1).sum(dim=0)).sum()


def z_loss(logits_RE: Tensor) -> Tensor:
    """Return the sum over rows of logsumexp(logits)^2, which keeps logits small (ST-MoE, eq. 5)."""
    return logits_RE.logsumexp(dim=-1).square().sum()
