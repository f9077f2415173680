"""Cosines of expert descriptors after subtraction of their mean.

Content that all experts share (a common init of the bases, the mean token) would bring every cosine near 1 and decide
the clusters by itself. So every similarity here is centered first, Gram matrices by double centering.

Shapes: E experts, S entries of a vector that describes an expert.
"""

import torch
from torch import Tensor


def double_centered(gram_EE: Tensor) -> Tensor:
    """Center a Gram matrix: `J K J` with `J = 1 - 11^T / E` (Schölkopf et al. 1998)."""
    return gram_EE - gram_EE.mean(0, keepdim=True) - gram_EE.mean(1, keepdim=True) + gram_EE.mean()


def cosine_of_gram(gram_EE: Tensor) -> Tensor:
    """Compute cosines of centered vectors from the Gram matrix of the uncentered ones, float64 [E, E].

    An expert that equals the mean up to rounding has cosine 0 to all others. Values that are not finite stay so.
    """
    gram_EE = gram_EE.double()
    rounding = len(gram_EE) * torch.finfo(torch.float64).eps * gram_EE.diagonal().abs().max()
    return _normalized(double_centered(gram_EE), rounding)


def cosine_of_vectors(x_ES: Tensor, known_E: Tensor | None = None) -> Tensor:
    """Compute cosines of the rows minus their mean, float64 [E, E].

    Args:
        x_ES: one row per expert, any floating type.
        known_E: mask of known rows; others are excluded from the mean and have cosine 0; None: all are known.
    """
    if known_E is None:
        known_E = torch.ones(len(x_ES), dtype=torch.bool, device=x_ES.device)
    largest = x_ES.abs().max().double()
    rounding = x_ES.shape[1] * (len(x_ES) * torch.finfo(x_ES.dtype).eps * largest) ** 2
    x_ES = x_ES.double()
    centered_ES = torch.where(known_E[:, None], x_ES - x_ES[known_E].mean(0), 0.0)
    return _normalized(centered_ES @ centered_ES.T, rounding)


def _normalized(gram_EE: Tensor, rounding: Tensor) -> Tensor:
    """Return `K_ij / sqrt(K_ii K_jj)`, diagonal 1; squared norms up to `rounding` count as zero. NaN stays NaN."""
    squared_E = gram_EE.diagonal()
    norm_E = torch.where(squared_E <= rounding, torch.inf, squared_E).sqrt()
    cosine_EE = (gram_EE / norm_E[:, None] / norm_E[None, :]).clamp(-1, 1)
    cosine_EE = (cosine_EE + cosine_EE.T) / 2
    return cosine_EE.fill_diagonal_(1.0)
