"""Gate of a token's single cluster: its value is 1, and its gradient trains the router by an advantage.

The plain gradient of the gate mostly measures what the loss would gain from a larger output of the whole layer. That
is the same for all tokens of a cluster and contains no information about routing: it only drives the clusters' logits
apart, faster than load balancing can correct. The gradient therefore has its mean over the tokens of the same sequence
and cluster subtracted. The difference is an advantage, as in policy gradients (REINFORCE with a group's mean as its
baseline). Where a sequence is divided over ranks, they sum over all of its tokens; it is never divided over
micro-batches, so the result does not depend on the layout.

Shapes: T tokens, D hidden, G clusters, B sequences; token t belongs to sequence t % B, as hidden states are [S, B, D].
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.mesh import RankGroup


def advantage_gate(
    y_TD: Tensor, logits_TG: Tensor, cluster_T1: Tensor, sequences: int, group: RankGroup | None = None
) -> Tensor:
    """Return `y_TD` times a gate of 1 whose gradient is that of log softmax(logits)[cluster] times the advantage.

    Args:
        y_TD: output of each token's cluster.
        sequences: number of sequences, B.
        group: ranks that hold the other tokens of these sequences; None: they are whole.
    """
    gated_TD: Tensor = _AdvantageGate.apply(  # type: ignore[no-untyped-call]
        y_TD, logits_TG, cluster_T1, sequences, group
    )
    return gated_TD


def advantage(
    grad_T: Tensor, cluster_T: Tensor, clusters: int, sequences: int, group: RankGroup | None = None
) -> Tensor:
    """Subtract from each gradient its mean over the tokens of the same sequence and cluster; 0 for a single token."""
    sequence_T = torch.arange(len(grad_T), device=grad_T.device) % sequences
    group_T = sequence_T * clusters + cluster_T
    sums_and_numbers = grad_T.new_zeros(sequences * clusters, 2)
    sums_and_numbers.index_add_(0, group_T, torch.stack([grad_T, torch.ones_like(grad_T)], dim=1))
    if group is not None:
        dist.all_reduce(sums_and_numbers, group=group.handle)
    sums, numbers = sums_and_numbers.unbind(1)
    return grad_T - (sums / numbers.clamp(min=1))[group_T]


class _AdvantageGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_TD: Tensor, logits_TG: Tensor, cluster_T1: Tensor, sequences: int, group: RankGroup | None
    ) -> Tensor:
        ctx.save_for_backward(y_TD, logits_TG.softmax(dim=-1), cluster_T1)
        ctx.sequences, ctx.group = sequences, group
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_TD, probability_TG, cluster_T1 = ctx.saved_tensors
        gain_T = torch.linalg.vecdot(grad_TD, y_TD).to(probability_TG.dtype)  # the gate's gradient
        advantage_T = advantage(gain_T, cluster_T1[:, 0], probability_TG.shape[1], ctx.sequences, ctx.group)
        chosen_TG = torch.zeros_like(probability_TG).scatter_(1, cluster_T1, 1.0)
        return grad_TD, advantage_T[:, None] * (chosen_TG - probability_TG), None, None, None
