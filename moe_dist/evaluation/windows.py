"""Sliding windows: every token of a text is predicted once, with the context that the stride leaves.

The text is a row of N tokens; the first is context only. Window i starts at token i * stride and predicts the S tokens
after its first. It scores the last `stride` of them, the first window all. So each of the N - 1 other tokens is scored
exactly once, with at least S - stride tokens before it once the text is that long.

Shapes: b windows of a batch, S tokens a window predicts.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class WindowBatch(NamedTuple):
    """Token numbers, int64 [b, S + 1], and a mask of the predicted tokens [b, S] that are scored."""

    sequence_bS: Tensor
    scored_bS: Tensor


def window_count(tokens: int, length: int, stride: int) -> int:
    """Return the number of windows of a text of `tokens` tokens."""
    return 1 + max(0, -(-(tokens - 1 - length) // stride))


def window_batches(
    ids: npt.NDArray[Any], length: int, stride: int, rank: int, ranks: int, batch: int
) -> Iterator[WindowBatch]:
    """Yield this rank's share of the windows.

    Every rank gets the same number of batches of the same shapes, since all take part in the model's collectives;
    surplus windows score nothing. Beyond the text's end the last token is repeated, on which no scored token depends.
    """
    count = window_count(len(ids), length, stride)
    per_rank = -(-count // ranks)
    for start in range(rank * per_rank, (rank + 1) * per_rank, batch):
        window_b = np.arange(start, min(start + batch, (rank + 1) * per_rank))
        position_bS = np.minimum(window_b, count - 1)[:, None] * stride + np.arange(length + 1)
        sequence_bS = ids[np.minimum(position_bS, len(ids) - 1)].astype(np.int64)
        new_bS = (np.arange(length) >= length - stride) | (window_b[:, None] == 0)
        scored_bS = new_bS & (position_bS[:, 1:] < len(ids)) & (window_b[:, None] < count)
        yield WindowBatch(torch.from_numpy(sequence_bS), torch.from_numpy(scored_bS))
