"""Two-phase transfer of a migration plan's pieces.

Phase one, `carry`: pieces are sent point to point, one message per pair of ranks, and verified by checksum; an
all-reduce of the results makes a damaged message an error on all ranks. Nothing has been changed until then, so the
failure of a rank leaves the others in their old state. Phase two, `settle`: received values are written to their
targets. A rank buffers all pieces that it receives or copies to itself, and those that it sends until they are sent;
large migrations are therefore divided into several plans.
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
"""Number of words summed at a time, since intermediate results take several times their bytes."""


class TensorStore(Protocol):
    """Access to this rank's tensors on any memory tier; `start` is an element index of the whole parameter."""

    def read(self, key: TensorKey, start: int, length: int) -> Tensor:
        """Return a copy of a run of elements, one-dimensional."""

    def write(self, key: TensorKey, start: int, values: Tensor) -> None:
        """Overwrite a run of elements."""

    def dtype(self, key: TensorKey) -> torch.dtype:
        """Return the dtype of a tensor's elements."""


class MigrationError(MoeDistError):
    """Failed migration, by a damaged message or by plans that differ between ranks; nothing has been changed."""


@dataclass(frozen=True)
class Arrivals:
    """Received pieces and their values, buffered until they are written."""

    waiting: list[tuple[Piece, Tensor]]
    store: TensorStore

    def try_out(self, wanted: Callable[[Piece], bool]) -> "Arrivals":
        """Write the wanted pieces on trial; `settle` of the result restores the values that they replaced."""
        chosen = [piece for piece, _ in self.waiting if wanted(piece)]
        replaced = [(piece, self.store.read(piece.target, piece.target_start, piece.length)) for piece in chosen]
        self.settle(wanted)
        return Arrivals(replaced, self.store)

    def settle(self, wanted: Callable[[Piece], bool] = lambda _: True) -> None:
        """Write the wanted pieces to their targets (phase two)."""
        for piece, values in self.waiting:
            if wanted(piece):
                self.store.write(piece.target, piece.target_start, values)


@torch.no_grad()
def carry(plan: MigrationPlan, rank: int, store: TensorStore, device: torch.device) -> Arrivals:
    """Send, receive and verify the pieces of a plan (phase one); collective over all ranks, also those without pieces.

    Raises:
        MigrationError: on every rank, if any rank received a damaged message.
    """
    waiting = [(piece, _read_source(store, piece)) for piece in plan.stays(rank)]
    outgoing = {
        peer: _pack_message(store, pieces, plan.bytes_between(rank, peer), device)
        for peer, pieces in plan.sends(rank).items()
    }
    incoming = {
        peer: torch.empty(plan.bytes_between(peer, rank) + CHECKSUM_BYTES, dtype=torch.uint8, device=device)
        for peer in plan.receives(rank)
    }
    _exchange(outgoing, incoming)
    outgoing.clear()
    _raise_if_damaged(incoming, rank, device)
    for peer, pieces in plan.receives(rank).items():
        waiting += _unpack_message(incoming[peer], pieces, store)
    return Arrivals(waiting, store)


def _exchange(outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
    operations = [dist.P2POp(dist.isend, message, peer) for peer, message in outgoing.items()]
    operations += [dist.P2POp(dist.irecv, message, peer) for peer, message in incoming.items()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _raise_if_damaged(incoming: dict[int, Tensor], rank: int, device: torch.device) -> None:
    damaged = [peer for peer, message in incoming.items() if not _checksum_matches(message)]
    worst = torch.tensor([dist.get_world_size() * rank + damaged[0] if damaged else -1], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if int(worst) >= 0:
        receiver, sender = divmod(int(worst), dist.get_world_size())
        raise MigrationError(
            f"experts that rank {sender} sent to rank {receiver} arrived damaged (checksum); nothing was changed: "
            "resume from the last checkpoint, and check the network between the two"
        )


def _checksum_matches(message: Tensor) -> bool:
    body, sent = message[:-CHECKSUM_BYTES], message[-CHECKSUM_BYTES:]
    return torch.equal(checksum(body).view(1).view(torch.uint8), sent)


def _pack_message(store: TensorStore, pieces: Iterable[Piece], size: int, device: torch.device) -> Tensor:
    message, first = torch.empty(size + CHECKSUM_BYTES, dtype=torch.uint8, device=device), 0
    for piece in pieces:
        values = _read_source(store, piece).view(torch.uint8)
        message[first : first + len(values)] = values
        first += len(values)
    message[size:] = checksum(message[:size]).view(1).view(torch.uint8)
    return message


def _unpack_message(message: Tensor, pieces: Iterable[Piece], store: TensorStore) -> list[tuple[Piece, Tensor]]:
    found, first = [], 0
    for piece in pieces:
        dtype = store.dtype(piece.target)
        end = first + piece.length * dtype.itemsize
        found.append((piece, message[first:end].view(dtype)))
        first = end
    return found


def _read_source(store: TensorStore, piece: Piece) -> Tensor:
    return store.read(piece.source, piece.start, piece.length)


def checksum(body: Tensor) -> Tensor:
    """Return a sum(word[i] * (2 i + 1)) modulo 2^64 over 32-bit words, modulo 2^64, to detect changes and swaps."""
    total = torch.tensor(len(body), device=body.device)
    for number, chunk in enumerate(body.split(4 * CHECKSUM_CHUNK)):
        padded = torch.nn.functional.pad(chunk, (0, -len(chunk) % 4)) if len(chunk) % 4 else chunk
        place = torch.arange(len(padded) // 4, device=body.device) + number * CHECKSUM_CHUNK
        total += (padded.view(torch.int32) * (2 * place + 1)).sum()
    return total
