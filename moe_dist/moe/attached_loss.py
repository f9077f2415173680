"""Lets a loss from inside a layer enter the total without a way out of the model.

Shapes: R rows, E choices (experts or clusters), K chosen of them.
"""

from typing import Any

import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.router_losses import balance_loss, z_loss


def attach_loss(x: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Passes `x` through; in the backward pass `loss` gets the gradient `scale`, as if scale * loss were in the total.

    An activation that is recomputed adds its loss once, since only one of the two forward passes is differentiated.
    """
    attached: Tensor = _AttachLoss.apply(x, loss, scale)  # type: ignore[no-untyped-call]
    return attached


def attach_router_losses(
    x: Tensor, logits_RE: Tensor, index_RK: Tensor, moe: MoEConfig, scale: float, balance: BalanceState
) -> Tensor:
    """Attaches to `x` the auxiliary and z-loss of one stage, where the configuration asks for them.

    Args:
        balance: keeps account of what enters the total.
        scale: of a sum over rows: 1 / (tokens of this rank's micro-batch * micro-batches of a step), so that the mean
            over ranks that ends the backward pass makes it a mean over the step's tokens.
    """
    if not torch.is_grad_enabled():
        return x
    if moe.balance == "aux_loss" and moe.aux_loss_weight:
        loss, weight = balance_loss(logits_RE, index_RK), moe.aux_loss_weight * scale
        balance.router_loss_2[0] += weight * loss.detach()
        x = attach_loss(x, loss, weight)
    if moe.z_loss_weight:
        loss, weight = z_loss(logits_RE), moe.z_loss_weight * scale
        balance.router_loss_2[1] += weight * loss.detach()
        x = attach_loss(x, loss, weight)
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
