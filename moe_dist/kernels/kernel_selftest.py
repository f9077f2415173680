"""Self-test of a low-rank SwiGLU backend: compare it with 'masked' on a small problem, on the device of its use.

Shapes: T tokens, K slots, N experts, F hidden width, H = 2 F (gate | up), R rank, C = 2 R.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.kernels.lowrank_swiglu import LowRankSwiGLU
from moe_dist.kernels.lowrank_swiglu_masked import lowrank_swiglu_masked

_TOKENS, _SLOTS, _EXPERTS, _WIDTH = 40, 2, 3, 48
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest error by dtype, relative to the largest entry; float32 allows for TF32."""


def kernel_selftest(kernel: LowRankSwiGLU, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """Compare a kernel's outputs and gradients with those of backend 'masked'.

    The comparison runs in a thread of its own, because the first use may be inside an activation-checkpointed layer:
    autograd modes and hooks are thread-local. The global random state is not used.

    Returns:
        The first difference found, or None.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_compare_with_masked, kernel, device, dtype, rank).result()


def _compare_with_masked(kernel: LowRankSwiGLU, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    leaves, slot_TK = _problem(device, dtype, rank)
    found, expected = _results(kernel, leaves, slot_TK), _results(lowrank_swiglu_masked, leaves, slot_TK)
    for name, value in expected.items():
        error = (found[name].float() - value.float()).abs().max() / value.float().abs().max()
        if not error <= _TOLERANCE[dtype]:  # negated so that a NaN fails
            return f"{name} differs from backend 'masked' by {error:.1e} of the largest entry"
    return None


def _problem(device: torch.device, dtype: torch.dtype, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "pre": (_TOKENS, 2 * _WIDTH),
        "z": (_TOKENS, _EXPERTS, 2 * rank),
        "gate": (_TOKENS, _SLOTS),
        "in_v_NRH": (_EXPERTS, 2, rank, _WIDTH),
        "out_u_NFR": (_EXPERTS, _WIDTH, rank),
        "hidden_gate_NF": (_EXPERTS, _WIDTH),
        "hidden_bias_NH": (_EXPERTS, 2 * _WIDTH),
    }
    drawn = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name in ("in_v_NRH", "out_u_NFR"):
        drawn[name] *= rank**-0.5
    slot_TK = torch.rand(_TOKENS, _EXPERTS, generator=draw).argsort(1)[:, :_SLOTS]
    slot_TK[::7, 0] = -1
    return {name: x.to(device, dtype).requires_grad_() for name, x in drawn.items()}, slot_TK.to(device)


def _results(kernel: LowRankSwiGLU, leaves: dict[str, Tensor], slot_TK: Tensor) -> dict[str, Tensor]:
    """Return the outputs `hidden` and `thin`, and the gradients of a weighted sum of both."""
    own = {name: x for name, x in leaves.items() if "_" in name}
    unused = dict.fromkeys(("base_in_DH", "base_out_FD", "in_u_NDR", "out_v_NRD"), leaves["pre"])
    weights = ClusterWeights(**own, **unused)
    outputs = kernel(leaves["pre"], leaves["z"], slot_TK, leaves["gate"], weights)
    d_outputs = [torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), d_outputs)
    named = {f"the gradient of {name}": d for name, d in zip(leaves, gradients, strict=True)}
    return {"hidden": outputs[0].detach(), "thin": outputs[1].detach(), **named}
