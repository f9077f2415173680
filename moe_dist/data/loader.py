"""Training batches: a pure function of (seed, step); the global batch is the same for any number of ranks.

Shapes: B sequences of the global batch, b = B / ranks of one rank, S tokens per sequence, K sources.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from moe_dist.data.blend import BlendPlan, Indices
from moe_dist.data.permutation import Permutation
from moe_dist.data.sequences import Sequences

ORDER = 1
"""Version of the order of sequences; raise it when an equal seed and step give others."""
EVERYTHING = BlendPlan([(0, [1.0])], [None])
"""Plan of a single source."""


class Batch(NamedTuple):
    """Sequences, int64 [b, S + 1], and the number of the source of each, int64 [b]."""

    sequences_BS: torch.Tensor
    source_B: torch.Tensor


class SequenceLoader:
    """Sequences of one or several sources, distributed over ranks; stateless.

    Step t takes the B positions of the plan from t B on. The draws of a source are its shuffled epochs, one after
    another without a gap, so that each sequence occurs exactly once per epoch. Rank r holds rows [r b, (r + 1) b).

    Raises:
        ValueError: `global_batch_size` is not divisible by `ranks`, or `rank` is out of range.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequences],
        global_batch_size: int,
        seed: int,
        rank: int,
        ranks: int,
        plan: BlendPlan = EVERYTHING,
    ) -> None:
        if global_batch_size % ranks or not 0 <= rank < ranks:
            raise ValueError(f"global_batch_size={global_batch_size} cannot be divided for rank {rank} of {ranks}")
        self.plan, self.sources = plan, sources
        self._numbered = list(sources.items())
        self._global_batch_size = global_batch_size
        self._rank_batch_size = global_batch_size // ranks
        self._first_row = rank * self._rank_batch_size
        self._seed = seed

    def batch(self, step: int) -> Batch:
        """Return this rank's part of the batch of `step` (from 0)."""
        source_b, index_b = self.indices(step)
        rows: list[torch.Tensor | None] = [None] * len(source_b)
        for number in np.unique(source_b):
            at = np.flatnonzero(source_b == number)
            for row, sequence in zip(at, self._numbered[number][1].read(index_b[at]), strict=True):
                rows[row] = sequence
        return Batch(torch.stack([row for row in rows if row is not None]), torch.from_numpy(source_b))

    def target_share(self, step: int) -> float:
        """Return the share of targets among the tokens of all batches with the weights of `step`."""
        shares = self.plan.shares(step * self._global_batch_size)
        return sum(
            share * sequences.target_share for share, sequences in zip(shares, self.sources.values(), strict=True)
        )

    def indices(self, step: int) -> tuple[Indices, Indices]:
        """Return the source of each of its sequences and the index there, int64 [b] each."""
        start = step * self._global_batch_size + self._first_row
        source_b, draw_b = self.plan.locate(np.arange(start, start + self._rank_batch_size))
        index_b = np.empty_like(draw_b)
        for number in np.unique(source_b):
            name, sequences = self._numbered[number]
            epoch_b = draw_b // len(sequences)
            for epoch in np.unique(epoch_b[source_b == number]).tolist():
                at = (source_b == number) & (epoch_b == epoch)
                order = Permutation(len(sequences), self._seed, name, epoch)
                index_b[at] = order(draw_b[at] % len(sequences))
        return source_b, index_b


class PrefetchingLoader:
    """Batches of a loader, of which a thread reads those of the next steps."""

    def __init__(self, loader: SequenceLoader, ahead: int = 2) -> None:
        self._loader, self._ahead = loader, ahead
        self.target_share, self.indices = loader.target_share, loader.indices
        self.plan, self.sources = loader.plan, loader.sources
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._asked: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """Return the batch of `step`, which is kept until that of a later step is asked for."""
        self._asked = {other: future for other, future in self._asked.items() if step <= other <= step + self._ahead}
        for wanted in range(step, step + self._ahead + 1):
            if wanted not in self._asked:
                self._asked[wanted] = self._pool.submit(self._loader.batch, wanted)
        return self._asked[step].result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)
