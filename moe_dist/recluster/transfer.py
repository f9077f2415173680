"""Carries a plan's pieces to their owners and keeps them beside the old values until all ranks switch.

Phase one: everything is sent point to point, one message for each pair of ranks, and verified by checksum on arrival;
all ranks learn whether all of it is whole. Until then nothing has changed, and a rank that dies leaves the others with
what they had. Phase two: `settle` puts what arrived into place. What is held beside a rank's own share is what moves to
it or within it and, while it is sent, what leaves it: so whoever has much to move plans it in several parts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.errors import MoeDistError
from moe_dist.recluster.migration_plan import MigrationPlan, Piece, TensorKey

CHECKSUM_BYTES = 8
CHECKSUM_CHUNK = 2**20
"""Words that are summed up at a time, since each takes eight times its bytes meanwhile."""


class TensorStore(Protocol):
    """This rank's cells, wherever they are kept; elements count from the beginning of the whole parameter."""

    def read(self, cell: TensorKey, start: int, length: int) -> Tensor:
        """A copy of a run of elements, one-dimensional."""

    def write(self, cell: TensorKey, start: int, values: Tensor) -> None:
        """Replaces a run of elements."""

    def dtype(self, cell: TensorKey) -> torch.dtype:
        """Of a cell's elements."""


class MigrationError(MoeDistError):
    """Experts that did not arrive whole; nothing has been changed."""


@dataclass(frozen=True)
class Arrivals:
    """What has come to this rank and waits: each piece and its values."""

    waiting: list[tuple[Piece, Tensor]]
    cells: TensorStore

    def try_out(self, wanted: Callable[[Piece], bool]) -> "Arrivals":
        """Puts the wanted pieces into place; returns what they replaced, which `settle` of the result brings back."""
        chosen = [piece for piece, _ in self.waiting if wanted(piece)]
        replaced = [(piece, self.cells.read(piece.target, piece.target_start, piece.length)) for piece in chosen]
        self.settle(wanted)
        return Arrivals(replaced, self.cells)

    def settle(self, wanted: Callable[[Piece], bool] = lambda _: True) -> None:
        """Phase two: puts the wanted pieces into place for good."""
        for piece, values in self.waiting:
            if wanted(piece):
                self.cells.write(piece.target, piece.target_start, values)


@torch.no_grad()
def carry(plan: MigrationPlan, rank: int, cells: TensorStore, device: torch.device) -> Arrivals:
    """Phase one; collective over all ranks unless the plan is empty, which sends nothing at all.

    Raises:
        MigrationError: on every rank, if anything arrived damaged on any.
    """
    if not plan.pieces:
        return Arrivals([], cells)
    waiting = [(piece, _source(cells, piece)) for piece in plan.stays(rank)]
    outgoing = {
        peer: _packed(cells, pieces, plan.bytes_between(rank, peer), device)
        for peer, pieces in plan.sends(rank).items()
    }
    incoming = {
        peer: torch.empty(plan.bytes_between(peer, rank) + CHECKSUM_BYTES, dtype=torch.uint8, device=device)
        for peer in plan.receives(rank)
    }
    _exchange(outgoing, incoming)
    outgoing.clear()
    _require_whole(incoming, rank, device)
    for peer, pieces in plan.receives(rank).items():
        waiting += _unpacked(incoming[peer], pieces, cells)
    return Arrivals(waiting, cells)


def _exchange(outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
    operations = [dist.P2POp(dist.isend, message, peer) for peer, message in outgoing.items()]
    operations += [dist.P2POp(dist.irecv, message, peer) for peer, message in incoming.items()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _require_whole(incoming: dict[int, Tensor], rank: int, device: torch.device) -> None:
    damaged = [peer for peer, message in incoming.items() if not _is_whole(message)]
    worst = torch.tensor([dist.get_world_size() * rank + damaged[0] if damaged else -1], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if int(worst) >= 0:
        receiver, sender = divmod(int(worst), dist.get_world_size())
        raise MigrationError(
            f"experts that rank {sender} sent to rank {receiver} arrived damaged (checksum); none of it was used: go "
            "on from the last checkpoint, and look at the network between the two"
        )


def _is_whole(message: Tensor) -> bool:
    body, sent = message[:-CHECKSUM_BYTES], message[-CHECKSUM_BYTES:]
    return torch.equal(checksum(body).view(1).view(torch.uint8), sent)


def _packed(cells: TensorStore, pieces: Iterable[Piece], size: int, device: torch.device) -> Tensor:
    message, first = torch.empty(size + CHECKSUM_BYTES, dtype=torch.uint8, device=device), 0
    for piece in pieces:
        values = _source(cells, piece).view(torch.uint8)
        message[first : first + len(values)] = values
        first += len(values)
    message[size:] = checksum(message[:size]).view(1).view(torch.uint8)
    return message


def _unpacked(message: Tensor, pieces: Iterable[Piece], cells: TensorStore) -> list[tuple[Piece, Tensor]]:
    found, first = [], 0
    for piece in pieces:
        dtype = cells.dtype(piece.target)
        end = first + piece.length * dtype.itemsize
        found.append((piece, message[first:end].view(dtype)))
        first = end
    return found


def _source(cells: TensorStore, piece: Piece) -> Tensor:
    return cells.read(piece.source, piece.start, piece.length)


def checksum(body: Tensor) -> Tensor:
    """A 64-bit sum of words, each times an odd number of its place, modulo 2^64: sees changes and exchanges."""
    total = torch.tensor(len(body), device=body.device)
    for number, chunk in enumerate(body.split(4 * CHECKSUM_CHUNK)):
        padded = torch.nn.functional.pad(chunk, (0, -len(chunk) % 4)) if len(chunk) % 4 else chunk
        place = torch.arange(len(padded) // 4, device=body.device) + number * CHECKSUM_CHUNK
        total += (padded.view(torch.int32) * (2 * place + 1)).sum()
    return total
