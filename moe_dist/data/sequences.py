"""Sequences of a token file by index.

Shapes: n indices, S tokens per sequence. A sequence is S + 1 ids: inputs are the first S, targets the last S.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from moe_dist.data.token_file import TokenFile
from moe_dist.errors import DataError

Indices = npt.NDArray[np.int64]


class Sequences(Protocol):
    """Sequences of one source."""

    @property
    def target_share(self) -> float:
        """Share of their targets that count for the loss."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> torch.Tensor:
        """Read the sequences of the given indices [n] as int64 [n, S + 1]; the complement of an id is no target."""


class ConcatenatedSequences:
    """Sequences that follow each other without a gap, and so may begin and end within a document.

    Sequence i is the tokens [i S, i S + S], so that every token but the first is a target once.

    Raises:
        DataError: there is not even one.
    """

    def __init__(self, tokens: TokenFile, length: int) -> None:
        self._tokens, self._length = tokens, length
        self._count = (len(tokens) - 1) // length
        if self._count < 1:
            raise too_short(tokens, length)

    def __len__(self) -> int:
        return self._count

    @property
    def target_share(self) -> float:
        """Share of the tokens that are targets."""
        return self._tokens.target_share

    def read(self, indices: Indices) -> torch.Tensor:
        """Read sequences, int64 [n, S + 1]."""
        positions = indices[:, None] * self._length + np.arange(self._length + 1)
        return torch.from_numpy(self._tokens.ids[positions].astype(np.int64))


def too_short(tokens: TokenFile, length: int) -> DataError:
    """Return the error of a text without a single sequence."""
    return DataError(
        f"{tokens.path.stem} text of {len(tokens)} tokens is shorter than one sequence of "
        f"model.sequence_length={length} (+ 1): give more text or lower it"
    )
