"""Standard expert parallelism: k copies of a token are sent directly to the ranks of its k experts.

Shapes: T tokens, K chosen experts, C = T*K copies, S copies sent, A copies received, P ranks, N experts per rank,
D hidden.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.permute import count, group_order, inverse, permuted
from moe_dist.dispatch.traffic_ledger import Payload


class ExpertRows(NamedTuple):
    """Copies on the rank of their experts, sorted by local expert, and their number by local expert."""

    x_AD: Tensor
    per_expert: list[int]


class FlatMetadata(NamedTuple):
    """Metadata of both the sender and the receiver of a dispatch.

    Attributes:
        copy_S: copies sent, ordered by expert.
        order_A, back_A: permutation of received copies from (source, expert) to (expert, source) order and its inverse;
            None: the copies are in order already.
        all_sent: True if no copy was dropped.
    """

    gate_TK: Tensor
    copy_S: Tensor
    send: list[int]
    receive: list[int]
    order_A: Tensor | None
    back_A: Tensor | None
    all_sent: bool


@dataclass(frozen=True)
class FlatDispatcher:
    """Exchange of copies between the ranks of tokens and of experts; expert e is on rank e // (E/P) of the group."""

    all_to_all: AllToAll
    experts: int

    def dispatch(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, keep_C: Tensor | None = None
    ) -> tuple[ExpertRows, FlatMetadata]:
        """Send a copy of each token to each of its experts.

        Args:
            keep_C: copies within the capacity, bool; None: all.
        """
        expert_C = expert_TK.flatten()
        if self.all_to_all.observed:
            kept_TK = expert_TK if keep_C is None else expert_TK.masked_fill(~keep_C.view_as(expert_TK), -1)
            self.all_to_all.observe(kept_TK, kept_TK // (self.experts // self.all_to_all.group.size))
        copy_S = expert_C.argsort(stable=True)
        if keep_C is not None:
            copy_S = copy_S[keep_C[copy_S]]
        count_PN = count(expert_C[copy_S], self.experts).view(self.all_to_all.group.size, -1)
        received_PN = self.all_to_all.exchange_counts(count_PN)
        send, receive = torch.stack([count_PN.sum(1), received_PN.sum(1)]).tolist()
        x_AD = self.all_to_all.exchange(x_TD[copy_S // expert_TK.shape[1]], send, receive, Payload.HIDDEN)
        per_expert, order_A, back_A = received_PN.sum(0).tolist(), None, None
        if min(received_PN.shape) > 1:
            order_A = group_order(received_PN, len(x_AD))
            back_A = inverse(order_A)
            x_AD = permuted(x_AD, order_A, back_A)
        metadata = FlatMetadata(gate_TK, copy_S, send, receive, order_A, back_A, keep_C is None)
        return ExpertRows(x_AD, per_expert), metadata

    def combine(self, y_AD: Tensor, metadata: FlatMetadata) -> Tensor:
        """Return y_TD = sum_k gate_k * expert_k(x); a dropped copy counts as zero."""
        if metadata.order_A is not None and metadata.back_A is not None:
            y_AD = permuted(y_AD, metadata.back_A, metadata.order_A)
        y_SD = self.all_to_all.exchange(y_AD, metadata.receive, metadata.send, Payload.HIDDEN)
        copy_S, gate_TK = metadata.copy_S, metadata.gate_TK
        if metadata.all_sent:
            y_CD = permuted(y_SD, inverse(copy_S), copy_S)
        else:
            y_CD = y_SD.new_zeros(gate_TK.numel(), y_SD.shape[1]).index_copy(0, copy_S, y_SD)
        return torch.einsum("tkd,tk->td", y_CD.unflatten(0, gate_TK.shape), gate_TK.to(y_CD.dtype))
