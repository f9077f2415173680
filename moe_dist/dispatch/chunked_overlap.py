"""Chunks of a hop that take turns: one on the wire, one in computation; and into how many chunks it pays to divide.

Forward, with D the departure of tokens, C their computation, R the way back, one chunk a letter:

    wire     D0   D1      R0 D2      R1 D3  ...  R(n-1)
    compute       C0      C1         C2     ...

Autograd runs what was made last first, so the backward pass is the same picture from right to left: the gradient of a
result is on the wire while the chunk behind it is computed.

A rank's rows for each destination are divided evenly, by a rule that both ends of the hop follow: no counts are sent
for chunks, and bytes are those of one chunk. A row is computed as it would be in one chunk, but for what a matrix
product of fewer rows rounds otherwise; gradients of weights are sums over chunks, equal up to the order of summation.

Shapes: C chunks, P counts (of the ranks of a group), L what a rank counts apart, R rows, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import PendingRows
from moe_dist.dispatch.permute import group_order

CANDIDATES = (1, 2, 4, 8)
LEAST_GAIN = 0.02
"""Of the time in one chunk: less is not worth another order of summation."""
BACKWARD_WORK = 2
"""Of the forward pass's computation."""


def shares(count_P: Tensor, chunks: int) -> Tensor:
    """count_CP: the rows of each count that each chunk takes, as evenly as they go; int64, any further axes stay."""
    end_C = torch.arange(chunks + 1, device=count_P.device).view(-1, *[1] * count_P.ndim)
    return (count_P * end_C).div(chunks, rounding_mode="floor").diff(dim=0)


@dataclass(frozen=True)
class Division:
    """How the rows of one hop are divided into chunks.

    Attributes:
        order_R: turns rows sorted by destination into rows sorted by chunk, then by destination; None: one chunk.
        send, receive: rows to and from each rank of the group, by chunk.
        received_CPL: rows that come, by chunk, source and what the source counted apart.
        received_of: the same of all sources together, known to the host.
    """

    order_R: Tensor | None
    send: list[list[int]]
    receive: list[list[int]]
    received_CPL: Tensor
    received_of: list[list[int]]

    @classmethod
    def of(cls, count_PL: Tensor, received_PL: Tensor, chunks: int) -> "Division":
        """From the rows that go and come; one synchronisation with the host."""
        count_CPL, received_CPL = shares(count_PL, chunks), shares(received_PL, chunks)
        counts, received = torch.stack([count_CPL, received_CPL]).tolist()
        send, receive = ([[sum(row) for row in chunk] for chunk in both] for both in (counts, received))
        order_R = group_order(count_CPL.flatten(1).T, sum(map(sum, send))) if chunks > 1 else None
        received_of = [[sum(column) for column in zip(*chunk, strict=True)] for chunk in received]
        return cls(order_R, send, receive, received_CPL, received_of)

    @property
    def chunks(self) -> int:
        """C: into how many chunks the hop is divided."""
        return len(self.send)

    def reorder(self, x_R: Tensor) -> Tensor:
        """From the order of destinations to that of chunks."""
        return x_R if self.order_R is None else x_R[self.order_R]

    def split(self, x_RD: Tensor) -> Sequence[Tensor]:
        """The chunks of rows that are in their order."""
        return [x_RD] if self.chunks == 1 else x_RD.split([sum(rows) for rows in self.send])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, without a copy of what is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def pipelined(
    chunks: int,
    depart: Callable[[int], Sequence[PendingRows]],
    compute: Callable[[int, list[Tensor]], Sequence[Tensor]],
    give_back: Callable[[int, Sequence[Tensor]], Sequence[PendingRows]],
) -> list[list[Tensor]]:
    """Has each chunk depart, computes what arrives, and returns what of it arrives back, by chunk.

    There is one chunk on the wire in each direction, so that it has the wire for itself, while one is computed.
    """
    done: list[list[Tensor]] = []
    returning: Sequence[PendingRows] | None = None
    going = depart(0)
    for chunk in range(chunks):
        arrived = _arrive(going)
        if chunk + 1 < chunks:
            going = depart(chunk + 1)
        results = compute(chunk, arrived)
        if returning is not None:
            done.append(_arrive(returning))
        returning = give_back(chunk, results)
    assert returning is not None
    return [*done, _arrive(returning)]


def _arrive(flights: Sequence[PendingRows]) -> list[Tensor]:
    return [flight.arrive() for flight in flights]


@dataclass(frozen=True)
class HopSpeed:
    """What decides about chunks, of the slowest rank.

    Attributes:
        latency: seconds of an exchange of next to nothing.
        exchange: seconds in which all rows of a micro-batch go one way, less the latency.
        compute: seconds of the forward pass of what they are computed in.
        chunk: seconds that each chunk adds to a forward pass.
        hidden: share of an exchange that takes no time beside a computation; 0 where both want the same processors.
    """

    latency: float
    exchange: float
    compute: float
    chunk: float
    hidden: float


def predicted_seconds(speed: HopSpeed, chunks: int) -> float:
    """Forward and backward pass of one hop there and back, in so many chunks.

    A pass does 2 C exchanges and C computations. Hidden in full, either the wire is never idle, or the computation
    waits only for the first chunk to come and the last one to go; what is hidden in part lies between that and one
    after the other.
    """
    total, way = 0.0, speed.latency + speed.exchange / chunks
    for work in (1, BACKWARD_WORK):
        computed = work * (speed.compute + chunks * speed.chunk)
        in_turn = 2 * chunks * way + computed
        at_once = max(2 * way + computed, 2 * chunks * way)
        total += in_turn - speed.hidden * (in_turn - at_once)
    return total


def choose_chunks(speed: HopSpeed, candidates: Sequence[int] = CANDIDATES) -> int:
    """The number of chunks that is predicted to be fastest; 1 unless another gains `LEAST_GAIN`."""
    best = min(candidates, key=lambda chunks: predicted_seconds(speed, chunks))
    return best if predicted_seconds(speed, best) <= (1 - LEAST_GAIN) * predicted_seconds(speed, 1) else 1
