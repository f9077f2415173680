"""Validation batches: the same sequences and the same mean loss for any number of ranks.

Shapes: b sequences per batch, S tokens per sequence.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moe_dist.data.sequences import Sequences


class ValidationBatch(NamedTuple):
    """Sequences, int64 [b, S + 1], their weights, float32 [b]: 1, or 0 for padding, and their indices in the file [b].

    mean loss = sum over ranks and batches of weight_b * loss_b / sum of weight_b, with loss_b a sequence's mean.
    """

    tokens: torch.Tensor
    weight: torch.Tensor
    indices: npt.NDArray[np.int64]


def validation_batches(
    sequences: Sequences, max_sequences: int, rank: int, ranks: int, batch: int
) -> Iterator[ValidationBatch]:
    """Yield this rank's share of at most `max_sequences` distinct sequences, spread evenly over the source.

    Every rank gets the same number of batches of the same shapes, since all take part in the model's collectives: if
    the sequences do not divide by the ranks, the last ranks are padded with sequences of weight 0.
    """
    available = len(sequences)
    count = min(max_sequences, available)
    per_rank = -(-count // ranks)
    for start in range(rank * per_rank, (rank + 1) * per_rank, batch):
        numbers = np.arange(start, min(start + batch, (rank + 1) * per_rank), dtype=np.int64)
        indices = np.where(numbers < count, numbers * available // count, 0)
        weight = torch.from_numpy((numbers < count).astype(np.float32))
        yield ValidationBatch(sequences.read(indices), weight, indices)
