"""Training batches: a pure function of (seed, step); the global batch is the same for any number of ranks.

Shapes: B sequences of the global batch, b = B / ranks of one rank, S tokens per sequence. Sequence i of a token file is
its tokens [i S, i S + S], one more than S: inputs are the first S, targets the last S, and every token but the first is
a target once per epoch.
"""

import numpy as np
import numpy.typing as npt
import torch

from moe_dist.data.token_file import TokenFile
from moe_dist.errors import DataError


def sequence_count(tokens: TokenFile, sequence_length: int) -> int:
    """Return the number of whole sequences in a token file.

    Raises:
        DataError: there is not even one.
    """
    count = (len(tokens) - 1) // sequence_length
    if count < 1:
        raise DataError(
            f"{tokens.path.stem} text of {len(tokens)} tokens is shorter than one sequence of "
            f"model.sequence_length={sequence_length} (+ 1): give more text or lower it"
        )
    return count


def read_sequences(tokens: TokenFile, sequence_length: int, indices: npt.NDArray[np.int64]) -> torch.Tensor:
    """Read the sequences of the given indices [n] as int64 [n, S + 1]."""
    positions = indices[:, None] * sequence_length + np.arange(sequence_length + 1)
    return torch.from_numpy(tokens.ids[positions].astype(np.int64))


class SequenceLoader:
    """Sequences of a token file, distributed over ranks and reshuffled every epoch; stateless.

    The shuffled epochs follow each other without a gap: step t takes the B positions from t B on, also across an
    epoch's end, so that each sequence occurs exactly once per epoch. Rank r holds rows [r b, (r + 1) b) of the global
    batch.

    Raises:
        DataError: the text is shorter than one sequence.
        ValueError: `global_batch_size` is not divisible by `ranks`, or `rank` is out of range.
    """

    def __init__(
        self, tokens: TokenFile, sequence_length: int, global_batch_size: int, seed: int, rank: int, ranks: int
    ) -> None:
        if global_batch_size % ranks or not 0 <= rank < ranks:
            raise ValueError(f"global_batch_size={global_batch_size} cannot be divided for rank {rank} of {ranks}")
        self.sequences = sequence_count(tokens, sequence_length)
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._global_batch_size = global_batch_size
        self._rank_batch_size = global_batch_size // ranks
        self._first_row = rank * self._rank_batch_size
        self._seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def batch(self, step: int) -> torch.Tensor:
        """Return this rank's part of the batch of `step` (from 0), int64 [b, S + 1]."""
        return read_sequences(self._tokens, self._sequence_length, self.indices(step))

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Return the indices of its sequences, int64 [b]."""
        start = step * self._global_batch_size + self._first_row
        positions = range(start, start + self._rank_batch_size)
        return np.array([self._order(p // self.sequences)[p % self.sequences] for p in positions], dtype=np.int64)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the epoch's permutation [sequences]; two epochs are cached, for steps that span a boundary."""
        if epoch not in self._orders:
            # RandomState's streams are frozen by NumPy's policy (NEP 19), Generator's are not: a run can be resumed
            # under another version of NumPy
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = random.permutation(self.sequences).astype(np.int64)
        return self._orders[epoch]
