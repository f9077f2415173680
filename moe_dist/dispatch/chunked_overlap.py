"""Overlap of communication and computation in chunks, and the choice of the number of chunks.

One chunk is exchanged while another is computed. Forward pass, with S for dispatch, C for computation, R for the return
of results, and the number of the chunk:

    wire     S0   S1      R0 S2      R1 S3  ...  R(n-1)
    compute       C0      C1         C2     ...

Autograd executes the nodes in reverse order of creation, so the backward pass is the same schedule from right to left:
the gradient of a result is exchanged while the following chunk is computed.

A rank's rows for each destination are divided evenly, by a rule that sender and receiver share: chunks need no
additional counts, and the total traffic does not change. A row's result does not depend on the chunks, except for the
rounding of a matrix product of fewer rows. Gradients of weights are sums over chunks, equal up to the order of
summation.

Shapes: C chunks, P ranks of a group, L separate counts of each rank, R rows, D hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import PendingRows
from moe_dist.dispatch.permute import group_order

Result = TypeVar("Result")
CANDIDATES = (1, 2, 4, 8)
LEAST_GAIN = 0.02
"""Least predicted gain, relative to the time with one chunk, for which several chunks are used."""
BACKWARD_WORK = 2
"""Computation of the backward pass, as a multiple of that of the forward pass."""


def shares(count_P: Tensor, chunks: int) -> Tensor:
    """Divide each count evenly over the chunks; return count_CP, int64. Further axes of `count_P` are kept."""
    end_C = torch.arange(chunks + 1, device=count_P.device).view(-1, *[1] * count_P.ndim)
    return (count_P * end_C).div(chunks, rounding_mode="floor").diff(dim=0)


@dataclass(frozen=True)
class Division:
    """Division of the rows of one exchange into chunks.

    Attributes:
        order_R: permutation from rows sorted by destination to rows sorted by chunk, then destination; None: one chunk.
        send, receive: rows to and from each rank of the group, by chunk.
        received_CPL: rows received, by chunk, source and separate count (cluster).
        received_of: received_CPL summed over sources, on the host.
    """

    order_R: Tensor | None
    send: list[list[int]]
    receive: list[list[int]]
    received_CPL: Tensor
    received_of: list[list[int]]

    @classmethod
    def of(cls, count_PL: Tensor, received_PL: Tensor, chunks: int) -> "Division":
        """Divide the rows sent and received; synchronizes once with the host."""
        count_CPL, received_CPL = shares(count_PL, chunks), shares(received_PL, chunks)
        counts, received = torch.stack([count_CPL, received_CPL]).tolist()
        send, receive = ([[sum(row) for row in chunk] for chunk in both] for both in (counts, received))
        order_R = group_order(count_CPL.flatten(1).T, sum(map(sum, send))) if chunks > 1 else None
        received_of = [[sum(column) for column in zip(*chunk, strict=True)] for chunk in received]
        return cls(order_R, send, receive, received_CPL, received_of)

    @property
    def chunks(self) -> int:
        """Number of chunks (C)."""
        return len(self.send)

    def reorder(self, x_R: Tensor) -> Tensor:
        """Reorder rows from the order of destinations to that of chunks."""
        return x_R if self.order_R is None else x_R[self.order_R]

    def split(self, x_RD: Tensor) -> Sequence[Tensor]:
        """Split rows, ordered by chunk, into the chunks."""
        return [x_RD] if self.chunks == 1 else x_RD.split([sum(rows) for rows in self.send])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def receive_chunks(chunks: int, start: Callable[[int], Sequence[PendingRows]]) -> Iterator[list[Tensor]]:
    """Yield the received rows of each chunk; the next chunk's exchange runs while the caller uses one.

    Args:
        start: starts the exchanges of a chunk.
    """
    pending = start(0)
    for chunk in range(chunks):
        received = _wait(pending)
        if chunk + 1 < chunks:
            pending = start(chunk + 1)
        yield received


def return_chunks(
    results: Iterable[Result], start: Callable[[int, Result], Sequence[PendingRows]]
) -> list[list[Tensor]]:
    """Exchange the results of each chunk in the order of their computation; return the received rows by chunk.

    Args:
        results: lazily computed results: the exchange of one chunk runs while the next is computed.
        start: starts the exchanges of a chunk's results.
    """
    done: list[list[Tensor]] = []
    pending: Sequence[PendingRows] = ()
    for chunk, result in enumerate(results):
        if chunk:
            done.append(_wait(pending))
        pending = start(chunk, result)
    return [*done, _wait(pending)]


def _wait(pending: Sequence[PendingRows]) -> list[Tensor]:
    return [rows.wait() for rows in pending]


@dataclass(frozen=True)
class ExchangeSpeed:
    """Measured speeds of the slowest rank that decide the number of chunks.

    Attributes:
        latency: latency of a nearly empty all-to-all, seconds.
        exchange: seconds of one exchange of all rows of a micro-batch, less the latency.
        compute: seconds of the forward pass over these rows.
        chunk: seconds that each chunk adds to a forward pass.
        hidden: share of an exchange that overlaps a computation; 0 where both use the same processors.
    """

    latency: float
    exchange: float
    compute: float
    chunk: float
    hidden: float


def predicted_seconds(speed: ExchangeSpeed, chunks: int) -> float:
    """Return the predicted seconds of one dispatch and combine, forward and backward, in `chunks` chunks.

    A pass has 2 C exchanges and C computations. With full overlap, either the wire is never idle, or the computation
    waits only for the first chunk's dispatch and the last chunk's return. Partial overlap is interpolated between full
    overlap and none.
    """
    total, way = 0.0, speed.latency + speed.exchange / chunks
    for work in (1, BACKWARD_WORK):
        computed = work * (speed.compute + chunks * speed.chunk)
        in_turn = 2 * chunks * way + computed
        at_once = max(2 * way + computed, 2 * chunks * way)
        total += in_turn - speed.hidden * (in_turn - at_once)
    return total


def choose_chunks(speed: ExchangeSpeed, candidates: Sequence[int] = CANDIDATES) -> int:
    """Return the number of chunks that is predicted to be fastest; 1 unless another gains `LEAST_GAIN`."""
    best = min(candidates, key=lambda chunks: predicted_seconds(speed, chunks))
    return best if predicted_seconds(speed, best) <= (1 - LEAST_GAIN) * predicted_seconds(speed, 1) else 1
