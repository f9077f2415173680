"""Standard expert parallelism: k copies of a token go straight to the ranks of its k experts, dropless.

Shapes: T tokens, K chosen experts, C = T*K copies, S of them sent, A arrived, P ranks, N experts a rank, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.permute import count, group_order, inverse, permuted
from moe_dist.dispatch.wire_format import travel

ExpertFunction = Callable[[Tensor, list[int]], Tensor]
"""(x_AD sorted by local expert, rows of each local expert) -> y_AD."""


@dataclass(frozen=True)
class FlatDispatch:
    """Takes copies to their experts and sums them back, weighted by their gates."""

    channel: AllToAll
    experts: int
    wire_dtype: torch.dtype

    def run(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, compute: ExpertFunction, keep_C: Tensor | None = None
    ) -> Tensor:
        """Returns y_TD = sum_k gate_k * expert_k(x); expert e lives on rank e // (E/P) of the group.

        Args:
            keep_C: which of the T*K copies are within the capacity, bool; None: all.
        """
        expert_C = expert_TK.flatten()
        if self.channel.ledger.observer is not None:
            kept_TK = expert_TK if keep_C is None else expert_TK.masked_fill(~keep_C.view_as(expert_TK), -1)
            self.channel.observe(kept_TK, kept_TK // (self.experts // self.channel.group.size))
        copy_S = expert_C.argsort(stable=True)  # the copies sent, by expert
        if keep_C is not None:
            copy_S = copy_S[keep_C[copy_S]]
        count_PN = count(expert_C[copy_S], self.experts).view(self.channel.group.size, -1)
        received_PN = self.channel.exchange_counts(count_PN)
        send, receive = torch.stack([count_PN.sum(1), received_PN.sum(1)]).tolist()
        x_AD = self._travel(x_TD[copy_S // expert_TK.shape[1]], send, receive)
        y_AD = self._compute(x_AD, received_PN, compute)
        y_SD = self._travel(y_AD, receive, send)
        if keep_C is None:
            y_CD = permuted(y_SD, inverse(copy_S), copy_S)
        else:
            y_CD = y_SD.new_zeros(expert_C.numel(), y_SD.shape[1]).index_copy(0, copy_S, y_SD)
        return torch.einsum("tkd,tk->td", y_CD.unflatten(0, expert_TK.shape), gate_TK.to(y_CD.dtype))

    def _compute(self, x_AD: Tensor, count_PN: Tensor, compute: ExpertFunction) -> Tensor:
        """Copies come by source rank, then by expert; the experts want them by expert."""
        per_expert = count_PN.sum(0).tolist()
        ranks, experts = count_PN.shape
        if ranks == 1 or experts == 1:
            return compute(x_AD, per_expert)
        order_A = group_order(count_PN, len(x_AD))
        back_A = inverse(order_A)
        return permuted(compute(permuted(x_AD, order_A, back_A), per_expert), back_A, order_A)

    def _travel(self, x_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return travel(self.channel, x_RD, send, receive, self.wire_dtype)
