"""Differentiable asynchronous all-to-all with variable splits and traffic accounting; the only all-to-alls of tokens.

`start` sends rows and `wait` returns those received; what is computed between the two overlaps the exchange. The
backward pass mirrors it: `wait`'s backward starts the exchange of gradients, `start`'s backward waits for it.

Shapes: R rows, D their width, B elements of a packed row, P ranks of the group, C counts for each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage, TrafficLedger
from moe_dist.dispatch.wire_format import IDENTITY_FORMAT, WireFormat
from moe_dist.distributed.mesh import RankGroup


@dataclass
class PendingAllToAll:
    """Running all-to-all; it keeps `sent` referenced, because the backend may still read it."""

    work: dist.Work
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """Return the rows received from the peers.

        Raises:
            RuntimeError: raised by torch if a peer is lost or the group's timeout has passed.
        """
        self.work.wait()
        return self.received


@dataclass(frozen=True)
class AllToAll:
    """All-to-all of one layer and stage over one group.

    Attributes:
        hidden_format: encoding of hidden vectors (`Payload.HIDDEN`) during the exchange; other payloads keep theirs.
    """

    group: RankGroup
    ledger: TrafficLedger
    layer: int
    stage: Stage
    hidden_format: WireFormat = IDENTITY_FORMAT

    @property
    def alone(self) -> bool:
        """True if the group is this rank alone and nothing is exchanged."""
        return self.group.size == 1

    @property
    def observed(self) -> bool:
        """True if the ledger has an observer of routing decisions."""
        return self.ledger.observer is not None

    def observe(self, choice_RK: Tensor, owner_RK: Tensor) -> None:
        """Pass a routing decision to the ledger's observer (`RoutingObserver.see`)."""
        if self.ledger.observer is not None and self.ledger.recording:
            self.ledger.observer.see(self.layer, self.stage, self.group.ranks, choice_RK, owner_RK)

    def exchange_counts(self, count_PC: Tensor) -> Tensor:
        """Send every peer its row of counts; return the counts received, of the same shape."""
        if self.alone:
            return count_PC
        received_PC = torch.empty_like(count_PC)
        dist.all_to_all_single(received_PC, count_PC.contiguous(), group=self.group.handle)
        size = count_PC.shape[1] * count_PC.element_size()
        self._record(Payload.COUNTS, Direction.FORWARD, [size] * self.group.size)
        return received_PC

    def start(self, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], payload: Payload) -> "PendingRows":
        """Send the first send[0] rows to the group's first rank, the next send[1] to its second, and so on.

        All ranks must start, and wait for, their exchanges in the same order.

        Returns:
            Handle whose `wait` gives the sum(receive) rows of the peers, ordered by rank.
        """
        if self.alone:
            return PendingRows(x_RD, None)
        wire_format = self.hidden_format if payload is Payload.HIDDEN else IDENTITY_FORMAT
        exchange = _Exchange(self, send, receive, payload, wire_format, x_RD.dtype)
        ticket: Tensor = _Start.apply(x_RD, exchange)  # type: ignore[no-untyped-call]
        return PendingRows(ticket, exchange)

    def exchange(self, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], payload: Payload) -> Tensor:
        """Start an exchange and wait for it."""
        return self.start(x_RD, send, receive, payload).wait()

    def launch(
        self, x_RB: Tensor, send: Sequence[int], receive: Sequence[int], payload: Payload, direction: Direction
    ) -> PendingAllToAll:
        """Issue the bare collective and enter it in the ledger; not differentiable."""
        sent_RB, received_RB = x_RB.contiguous(), x_RB.new_empty((sum(receive), *x_RB.shape[1:]))
        work = dist.all_to_all_single(
            received_RB, sent_RB, list(receive), list(send), group=self.group.handle, async_op=True
        )
        row_size = x_RB.shape[1:].numel() * x_RB.element_size()
        self._record(payload, direction, [rows * row_size for rows in send])
        return PendingAllToAll(work, sent_RB, received_RB)

    def _record(self, payload: Payload, direction: Direction, bytes_to: Sequence[int]) -> None:
        self.ledger.record(self.layer, self.stage, payload, direction, self.group.ranks, bytes_to)


@dataclass
class _Exchange:
    """State shared by the two ends of one differentiable exchange."""

    all_to_all: AllToAll
    send: Sequence[int]
    receive: Sequence[int]
    payload: Payload
    wire_format: WireFormat
    dtype: torch.dtype
    pending: PendingAllToAll | None = None

    def start(self, x_RD: Tensor, direction: Direction) -> None:
        splits = (self.send, self.receive) if direction is Direction.FORWARD else (self.receive, self.send)
        self.pending = self.all_to_all.launch(self.wire_format.pack(x_RD), *splits, self.payload, direction)

    def wait(self) -> Tensor:
        pending, self.pending = self.pending, None
        assert pending is not None, "an exchange is waited for once for each start"
        return self.wire_format.unpack(pending.wait(), self.dtype)


@dataclass(frozen=True)
class PendingRows:
    """Rows whose all-to-all is running.

    Attributes:
        ticket: empty tensor that connects start and wait in autograd's graph, or the rows if nothing is exchanged.
        exchange: state of the exchange; None: the group is this rank alone.
    """

    ticket: Tensor
    exchange: _Exchange | None

    def wait(self) -> Tensor:
        """Return the rows received; to be called once."""
        if self.exchange is None:
            return self.ticket
        rows: Tensor = _Wait.apply(self.ticket, self.exchange)  # type: ignore[no-untyped-call]
        return rows


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(x_RD, Direction.FORWARD)
        return x_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(grad_RD, Direction.BACKWARD)
        return grad_RD.new_empty(0), None
