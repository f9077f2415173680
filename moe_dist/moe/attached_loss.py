"""Router losses that are added to the total loss from inside a layer, without an additional output of the model.

Shapes: R rows, E choices (experts or clusters), K chosen of them.
"""

from typing import Any

import torch
from torch import Tensor

from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.router_losses import z_loss


def attach_loss(x: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return `x`; in the backward pass `loss` gets the gradient `scale`, as if the total contained scale * loss.

    With activation checkpointing the loss counts once, since only one of the two forward passes is differentiated.
    """
    attached: Tensor = _AttachLoss.apply(x, loss, scale)  # type: ignore[no-untyped-call]
    return attached


def attach_router_losses(
    x: Tensor, logits_RE: Tensor, index_RK: Tensor, balance: BalanceState, z_loss_weight: float, scale: float
) -> Tensor:
    """Attach to `x` the balancer's auxiliary loss and the z-loss of one routing decision.

    Args:
        balance: balance state; its balancer computes the auxiliary loss, and it accumulates both losses.
        z_loss_weight: weight of the z-loss; 0: none.
        scale: factor of a sum over rows: 1 / (tokens of this rank's micro-batch * micro-batches of a step). The mean
            over ranks at the end of the backward pass then makes it a mean over the step's tokens.
    """
    if not torch.is_grad_enabled():
        return x
    weighted = [balance.balancer.loss(logits_RE, index_RK)]
    weighted.append((z_loss(logits_RE), z_loss_weight) if z_loss_weight else None)
    for entry, loss_and_weight in enumerate(weighted):
        if loss_and_weight is not None:
            loss, weight = loss_and_weight[0], loss_and_weight[1] * scale
            balance.router_loss_2[entry] += weight * loss.detach()
            x = attach_loss(x, loss, weight * balance.loss_scale)
    return x


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grad, torch.tensor(ctx.scale, dtype=dtype, device=device), None
