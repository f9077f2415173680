"""The one place that issues all-to-all collectives: autograd-correct, uneven, counted, and not waited for until needed.

Rows `depart` and later `arrive`; what is computed in between runs while they are on the wire. The backward pass mirrors
it: a gradient departs where the rows arrived, and is waited for where they departed.

Shapes: R rows, D their width, B what a row travels as, P ranks of the group, C counts for each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage, TrafficLedger
from moe_dist.distributed.mesh import RankGroup


class WireFormat(Protocol):
    """What rows, and their gradients, travel as."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """What is sent for each row, [R, B]."""

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows again, [R, D], in that type."""


class IdentityFormat:
    """Rows travel in their own type."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """Nothing is changed."""
        return x_RD

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Nothing was changed."""
        return packed_RB


IDENTITY_FORMAT = IdentityFormat()


@dataclass
class PendingAllToAll:
    """A collective under way; `sent` is kept as long as it may be read."""

    work: dist.Work
    sent: Tensor
    received: Tensor

    def finish(self) -> Tensor:
        """Waits for what the peers sent.

        Raises:
            RuntimeError: of torch, where a peer is lost or the time of the group has run out.
        """
        self.work.wait()
        return self.received


@dataclass(frozen=True)
class AllToAll:
    """All-to-all among one group, on behalf of one layer and stage."""

    group: RankGroup
    ledger: TrafficLedger
    layer: int
    stage: Stage

    @property
    def alone(self) -> bool:
        """Nothing to exchange: the group is this rank."""
        return self.group.size == 1

    def observe(self, choice_RK: Tensor, home_RK: Tensor) -> None:
        """Shows a routing decision to whoever measures (`RoutingObserver.see`)."""
        if self.ledger.observer is not None and self.ledger.recording:
            self.ledger.observer.see(self.layer, self.stage, self.group.ranks, choice_RK, home_RK)

    def exchange_counts(self, count_PC: Tensor) -> Tensor:
        """Tells every peer how many rows follow; returns what the peers tell this rank, of the same shape."""
        if self.alone:
            return count_PC
        received_PC = torch.empty_like(count_PC)
        dist.all_to_all_single(received_PC, count_PC.contiguous(), group=self.group.handle)
        size = count_PC.shape[1] * count_PC.element_size()
        self._record(Payload.COUNTS, Direction.FORWARD, [size] * self.group.size)
        return received_PC

    def depart(
        self,
        x_RD: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        payload: Payload,
        form: WireFormat = IDENTITY_FORMAT,
    ) -> "PendingRows":
        """Sends the first send[0] rows to the group's first rank, the next send[1] to its second, and so on.

        All ranks must let flights depart, and arrive, in the same order. Differentiable: gradients make the way back
        in the same form.

        Returns:
            On whose arrival the sum(receive) rows are here that the peers sent, in the order of their ranks.
        """
        if self.alone:
            return PendingRows(x_RD, None)
        route = _Route(self, send, receive, payload, form, x_RD.dtype)
        ticket: Tensor = _Depart.apply(x_RD, route)  # type: ignore[no-untyped-call]
        return PendingRows(ticket, route)

    def exchange_rows(self, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], payload: Payload) -> Tensor:
        """Departs, and waits for the arrival."""
        return self.depart(x_RD, send, receive, payload).arrive()

    def begin(
        self, x_RB: Tensor, send: Sequence[int], receive: Sequence[int], payload: Payload, direction: Direction
    ) -> PendingAllToAll:
        """The bare collective and its entry in the ledger."""
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
class _Route:
    """What both ends of a flight share."""

    channel: AllToAll
    send: Sequence[int]
    receive: Sequence[int]
    payload: Payload
    form: WireFormat
    dtype: torch.dtype
    pending: PendingAllToAll | None = None

    def begin(self, x_RD: Tensor, direction: Direction) -> None:
        there = (self.send, self.receive) if direction is Direction.FORWARD else (self.receive, self.send)
        self.pending = self.channel.begin(self.form.pack(x_RD), *there, self.payload, direction)

    def finish(self) -> Tensor:
        pending, self.pending = self.pending, None
        assert pending is not None, "a flight arrives once for each time it has departed"
        return self.form.unpack(pending.finish(), self.dtype)


@dataclass(frozen=True)
class PendingRows:
    """Rows under way.

    Attributes:
        ticket: of no elements, joins departure and arrival in autograd's graph; or the rows, where nobody else is.
    """

    ticket: Tensor
    route: _Route | None

    def arrive(self) -> Tensor:
        """Waits for the rows; to be called once."""
        if self.route is None:
            return self.ticket
        rows: Tensor = _Arrive.apply(self.ticket, self.route)  # type: ignore[no-untyped-call]
        return rows


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        route.begin(x_RD, Direction.FORWARD)
        return x_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.route.finish(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return route.finish()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        ctx.route.begin(grad_RD, Direction.BACKWARD)
        return grad_RD.new_empty(0), None
