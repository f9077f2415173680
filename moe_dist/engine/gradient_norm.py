"""Exact global gradient norm over all three parameter classes, which replaces DeepSpeed's.

DeepSpeed 0.19 averages the norms of experts over their replicas (ZeRO 1 and 2) or omits them (ZeRO 0). Its norm, and
therefore its clipping, depends on the expert placement (deepspeedai/DeepSpeed#8475). Here every element of the gradient
counts once: with ZeRO 1 and 2 exactly one rank owns it; with ZeRO 0 each of its n holders adds 1/n of its square.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

CopiesOf = Callable[[nn.Parameter], int]
Square = Callable[[], Tensor]
"""Function that returns this rank's part of the squared norm of gradients outside the optimizer; float64."""


def nothing_else() -> Tensor:
    """Return 0: there are no gradients outside the optimizer."""
    return torch.zeros((), dtype=torch.float64)


def global_norm(
    gradients: Iterable[tuple[Tensor, int]], device: torch.device, elsewhere: Square = nothing_else
) -> Tensor:
    """Return the square root of the sum over all ranks and (gradient, copies) of |gradient|^2 / copies; collective.

    The sum is in float64, because the order of its terms depends on the placement of clusters and the result should
    not. Returns a float32 scalar.

    Args:
        gradients: pairs of a gradient and the number of ranks that hold it.
        elsewhere: returns this rank's part of the squared norm of further gradients.
    """
    square = torch.zeros((), dtype=torch.float64, device=device)
    for gradient, copies in gradients:
        square += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).square() / copies
    square += elsewhere().to(device)
    dist.all_reduce(square)
    return square.sqrt().float()


def install(engine: Any, copies_of: CopiesOf, clip_norm: float, elsewhere: Square = nothing_else) -> None:
    """Patch a DeepSpeed engine to report and clip by the exact norm, for every ZeRO stage and precision."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        _install_partitioned(optimizer, elsewhere)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        _install_unfused(optimizer, copies_of, engine.device, elsewhere)
    else:
        _install_plain(engine, copies_of, clip_norm, elsewhere)


def clip_factor(optimizer: Any, norm: Tensor, clip_norm: float) -> Tensor | None:
    """Return the factor by which an optimizer multiplies its gradients, bit-identical to its own; None: 1.

    Args:
        norm: global norm of the gradients, divided by the optimizer's loss scale.
    """
    mixed = isinstance(optimizer, (DeepSpeedZeroOptimizer, FP16_UnfusedOptimizer))
    scale = optimizer.loss_scale if mixed else 1.0
    if clip_norm == 0:
        return None if scale == 1 else torch.tensor(1.0 / scale)
    if mixed:
        return 1.0 / (((norm + 1e-6) / clip_norm).clamp(min=1.0) * scale)
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)


def _install_partitioned(optimizer: Any, elsewhere: Square) -> None:
    def norm_of_partitions(self: Any, norm_type: int = 2) -> Tensor:
        partitions = (gradients for gradients in self.averaged_gradients.values() if gradients is not None)
        own = ((gradient, 1) for part in partitions for gradient in part)
        return global_norm(own, torch.device(self.device), elsewhere)

    optimizer.scaled_global_norm = MethodType(norm_of_partitions, optimizer)


def _install_unfused(optimizer: Any, copies_of: CopiesOf, device: torch.device, elsewhere: Square) -> None:
    clip = optimizer.unscale_and_clip_grads
    scaled = torch.zeros((), device=device)

    def overflows(param_groups: Any = None) -> bool:
        held = (parameter for group in optimizer.fp16_groups for parameter in group if parameter.grad is not None)
        scaled.copy_(global_norm(((one.grad, copies_of(one)) for one in held), device, elsewhere))
        return not scaled.isfinite()

    def clip_by_true_norm(self: Any, total_norm: Any, apply_scale: bool = True) -> Any:
        self._global_grad_norm = scaled / self.loss_scale
        return clip(scaled, apply_scale)

    optimizer.overflow_checker.check = overflows  # before the gradients are used; DeepSpeed knows no others
    optimizer.unscale_and_clip_grads = MethodType(clip_by_true_norm, optimizer)


def _install_plain(engine: Any, copies_of: CopiesOf, clip_norm: float, elsewhere: Square) -> None:
    step = engine.optimizer.step

    def clip_and_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = global_norm(((parameter.grad, copies_of(parameter)) for parameter in held), engine.device, elsewhere)
        self._global_grad_norm = norm
        factor = clip_factor(self, norm, clip_norm)
        if factor is not None:
            torch._foreach_mul_([parameter.grad for parameter in held], factor)
        return step(*args, **kwargs)

    engine.optimizer.step = MethodType(clip_and_step, engine.optimizer)
    engine.clip_fp32_gradients = lambda: None  # DeepSpeed's clipping ignores experts
