"""Best low-rank column space of a matrix, exact or by a randomized range finder.

Shapes: I rows of a matrix, O its columns, R rank, K = R + oversampling.
"""

import torch
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 3
"""Power iterations; residuals of trained experts have flat spectra, for which fewer are visibly short of the optimum.
"""


def leading_right_vectors(a_IO: Tensor, rank: int, seed: int | None = None) -> Tensor:
    """Return Q_OR, orthonormal, such that `a Q Q^T` is the nearest matrix of that rank (Eckart and Young 1936).

    The sign of each column is fixed (its largest entry is positive), so that equal input gives equal output.

    Args:
        rank: from 0 to min(I, O).
        seed: seed of the randomized range finder (Halko et al. 2011), the same on all ranks; None: exact.

    Raises:
        ValueError: the rank is not in 0 to min(I, O).
    """
    if not 0 <= rank <= min(a_IO.shape):
        raise ValueError(f"rank={rank} must be in 0 to {min(a_IO.shape)} for a matrix of {tuple(a_IO.shape)}")
    q_OR: Tensor
    if rank == 0:
        return a_IO.new_zeros(a_IO.shape[1], 0)
    if seed is None or rank + OVERSAMPLING >= min(a_IO.shape):
        q_OR = torch.linalg.svd(a_IO, full_matrices=False).Vh[:rank].T
    else:
        range_OK = _right_range(a_IO, rank + OVERSAMPLING, torch.Generator().manual_seed(seed))
        q_OR = range_OK @ torch.linalg.svd(a_IO @ range_OK, full_matrices=False).Vh[:rank].T
    largest_1R: Tensor = q_OR.gather(0, q_OR.abs().argmax(0, keepdim=True))
    return q_OR * torch.where(largest_1R < 0, -1.0, 1.0).to(q_OR.dtype)


def _right_range(a_IO: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal columns [O, K] that nearly span the leading right singular vectors."""
    drawn_IK = torch.randn(a_IO.shape[0], columns, generator=generator, dtype=torch.float64)
    q_OK: Tensor = torch.linalg.qr(a_IO.T @ drawn_IK.to(a_IO)).Q
    for _ in range(POWER_ITERATIONS):
        q_OK = torch.linalg.qr(a_IO.T @ torch.linalg.qr(a_IO @ q_OK).Q).Q
    return q_OK
