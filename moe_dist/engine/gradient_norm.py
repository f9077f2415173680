"""The true global gradient norm over all three parameter classes, in place of DeepSpeed's.

DeepSpeed 0.19 averages the norms of experts over their replicas (ZeRO 1 and 2) or leaves them out (ZeRO 0), so that
its norm, and with it the clipping, depends on where experts are placed (deepspeedai/DeepSpeed#8475). Here every
element of the gradient counts once: with ZeRO 1 and 2 exactly one rank owns it; with ZeRO 0 each of its n holders adds
1/n of its square.
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


def global_norm(gradients: Iterable[tuple[Tensor, int]], device: torch.device) -> Tensor:
    """sqrt of the sum over all ranks and (gradient, copies) of |gradient|^2 / copies; collective, float32 scalar.

    Summed in float64, so that the order of the terms, which follows from where clusters live, leaves no trace.
    """
    square = torch.zeros((), dtype=torch.float64, device=device)
    for gradient, copies in gradients:
        square += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).square() / copies
    dist.all_reduce(square)
    return square.sqrt().float()


def install(engine: Any, copies_of: CopiesOf, clip_norm: float) -> None:
    """Makes `engine` (a DeepSpeedEngine) report and clip by the true norm, whatever its ZeRO stage and precision."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.scaled_global_norm = MethodType(_norm_of_partitions, optimizer)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        _install_unfused(optimizer, copies_of, engine.device)
    else:
        _install_plain(engine, copies_of, clip_norm)


def _norm_of_partitions(optimizer: Any, norm_type: int = 2) -> Tensor:
    partitions = (gradients for gradients in optimizer.averaged_gradients.values() if gradients is not None)
    return global_norm(((gradient, 1) for part in partitions for gradient in part), torch.device(optimizer.device))


def _install_unfused(optimizer: Any, copies_of: CopiesOf, device: torch.device) -> None:
    clip = optimizer.unscale_and_clip_grads

    def clip_by_true_norm(self: Any, total_norm: Any, apply_scale: bool = True) -> Any:
        pairs = [
            pair
            for groups in zip(self.fp32_groups, self.fp16_groups, strict=True)
            for pair in zip(*groups, strict=True)
        ]
        self._global_grad_norm = global_norm(((master.grad, copies_of(held)) for master, held in pairs), device)
        return clip(self._global_grad_norm, apply_scale)

    optimizer.unscale_and_clip_grads = MethodType(clip_by_true_norm, optimizer)


def _install_plain(engine: Any, copies_of: CopiesOf, clip_norm: float) -> None:
    step = engine.optimizer.step

    def clip_and_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = global_norm(((parameter.grad, copies_of(parameter)) for parameter in held), engine.device)
        self._global_grad_norm = norm
        if clip_norm > 0:
            torch._foreach_mul_([parameter.grad for parameter in held], (clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return step(*args, **kwargs)

    engine.optimizer.step = MethodType(clip_and_step, engine.optimizer)
    engine.clip_fp32_gradients = lambda: None  # DeepSpeed's own knows nothing of experts
