"""The one place that issues all-to-all collectives: autograd-correct, uneven, counted.

Shapes: R rows, D their width, P ranks of the group, C counts for each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.dispatch.traffic import Direction, Payload, Stage, TrafficLedger
from moe_dist.topology.mesh import RankGroup


@dataclass(frozen=True)
class Channel:
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

    def exchange_rows(self, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], payload: Payload) -> Tensor:
        """Sends the first send[0] rows to the group's first rank, the next send[1] to its second, and so on.

        Returns the sum(receive) rows that the peers sent, in the order of their ranks. Differentiable: gradients make
        the way back in `x_RD`'s type.
        """
        if self.alone:
            return x_RD
        rows: Tensor = _ExchangeRows.apply(x_RD, self, send, receive, payload)  # type: ignore[no-untyped-call]
        return rows

    def issue(
        self, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], payload: Payload, direction: Direction
    ) -> Tensor:
        """The bare collective and its entry in the ledger."""
        received_RD = x_RD.new_empty((sum(receive), *x_RD.shape[1:]))
        dist.all_to_all_single(received_RD, x_RD.contiguous(), list(receive), list(send), group=self.group.handle)
        row_size = x_RD.shape[1:].numel() * x_RD.element_size()
        self._record(payload, direction, [rows * row_size for rows in send])
        return received_RD

    def _record(self, payload: Payload, direction: Direction, bytes_to: Sequence[int]) -> None:
        self.ledger.record(self.layer, self.stage, payload, direction, self.group.ranks, bytes_to)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, channel: Channel, send: Sequence[int], receive: Sequence[int], payload: Payload
    ) -> Tensor:
        ctx.channel, ctx.send, ctx.receive, ctx.payload = channel, send, receive, payload
        return channel.issue(x_RD, send, receive, payload, Direction.FORWARD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = ctx.channel.issue(grad_RD, ctx.receive, ctx.send, ctx.payload, Direction.BACKWARD)
        return grad, None, None, None, None
