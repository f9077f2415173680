"""Low-rank SwiGLU, backend 'triton': one fused GPU kernel each for the forward and the backward pass.

A kernel fuses the low-rank correction, SwiGLU, the expert vectors and the gated sum. It keeps a tile of the hidden
units in registers and recomputes it in the backward pass, so that no tensor of [tokens, k, hidden] is stored: `pre` is
read once and `hidden` is written once. The GEMMs around it are the library's (ADR 17). Float32, bfloat16 and float16,
with arithmetic and sums in float32.

Tokens are sorted by their set of experts, so that a block of tokens needs about k experts. Sorting needs no host
synchronization and costs no bandwidth, because a block reads whole rows.

The kernels have been run in Triton's interpreter and compiled for GPUs, but neither run on a GPU nor timed there.
Before their first use on a device they are compared with backend 'masked' (`kernel_selftest`), and not used if they
differ.

Shapes: T tokens, K slots, N experts of the cluster, R rank, F hidden width, H = 2 F (gate | up), C = 2 R; W runs
of columns, S splits of the tokens.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.compression.quantization import QuantizedFactor
from moe_dist.kernels import c_compiler as native
from moe_dist.kernels.kernel_selftest import kernel_selftest

Factor = tuple[Tensor, Tensor | None, Tensor | None]  # (values, None, None) or (codes, scales, zero points or None)
Vectors = tuple[Tensor, Tensor] | tuple[None, None]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_RANK = 64  # limited by the registers of a block
_CAPABILITY = 8  # least compute capability of the GPU: bfloat16 in its tensor cores
_SPLIT = 512  # tokens for which one program sums the factors' gradients
_SET_BITS = 62  # bits of an int64 that represent a set of experts
_RUN = 256  # columns of one program
_TILE = {"B": 32, "L": 32, "num_warps": 4}  # spills almost no registers (Triton 3.9, sm_80, bfloat16, rank 8)
REQUIREMENTS = (
    f"it needs triton, a GPU of compute capability {_CAPABILITY} (or TRITON_INTERPRET=1), float32, bfloat16 or "
    f"float16, a rank up to {_MAX_RANK}, and kernels that agree with backend 'masked' there"
)
_logger = logging.getLogger(__name__)


def available(device: torch.device, dtype: torch.dtype, rank: int, width: int) -> bool:
    """Return True if the kernels support this device, dtype and shape; the first call runs their self-test."""
    fits = native.enabled() and dtype in _DTYPES and rank <= _MAX_RANK and width > 0
    return fits and (_capable(device) or _interpreted(device)) and _works(device, dtype, rank)


def _interpreted(device: torch.device) -> bool:
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _capable(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] >= _CAPABILITY


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Run the kernels' self-test; return False if it fails, and log the reason once."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        wrong = kernel_selftest(lowrank_swiglu_triton, device, dtype, rank)
    except Exception as error:  # a compiler or a driver may raise anything
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        _logger.warning(
            "backend 'triton' is not used on %s, torch is: %s", device, wrong.strip().partition("\n")[0][:500]
        )
    return wrong is None


def lowrank_swiglu_triton(
    pre_TH: Tensor, z_TNC: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights
) -> tuple[Tensor, Tensor]:
    """Return `sum_k p_k h_k` [T, F] and `p_e (h_e U_e)` [T, N, R], zero for experts not chosen (`LowRankSwiGLU`)."""
    in_v_NRH, out_u_NRF = weights.in_v_NRH.contiguous(), weights.out_u_NFR.transpose(1, 2).contiguous()
    routed = (pre_TH.contiguous(), slot_TK.contiguous(), z_TNC.contiguous(), gate_TK.float().contiguous())
    inputs = (*routed, in_v_NRH, out_u_NRF, *_as_float32(weights.vectors()))
    outputs = _LowRankSwiGLUTriton.apply(*inputs)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], outputs)


def lowrank_swiglu_packed(
    pre_TH: Tensor,
    z_TNC: Tensor,
    slot_TK: Tensor,
    gate_TK: Tensor,
    factors: tuple[QuantizedFactor, QuantizedFactor],
    vectors: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return `lowrank_swiglu_triton` of quantized in_v_NRH and out_u_NFR, bit-identically; not differentiable.

    The kernel unpacks the factors' codes in registers.
    """
    quantization = factors[0].format
    routed = (pre_TH.contiguous(), slot_TK.contiguous(), z_TNC.contiguous(), gate_TK.float().contiguous())
    in_v, out_u = ((x.codes_XB, x.scales_XG, x.zeros_XB) for x in factors)
    packing = (quantization.bits, quantization.group_size)
    return _forward(routed, _order(slot_TK), in_v, out_u, _as_float32(vectors), packing)


class _LowRankSwiGLUTriton(torch.autograd.Function):
    """Autograd function of the kernels.

    All tensors are contiguous; gate and vectors are float32, all others have the dtype of `pre`. out_u is [N, R, F].
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, slot: Tensor, z: Tensor, gate: Tensor, in_v: Tensor, out_u: Tensor, *vectors: Any
    ) -> tuple[Tensor, Tensor]:
        order = _order(slot)
        ctx.save_for_backward(pre, slot, z, gate, order, in_v, out_u, *vectors)
        return _forward((pre, slot, z, gate), order, _plain(in_v), _plain(out_u), vectors, (0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor, d_thin: Tensor) -> tuple[Tensor | None, ...]:
        pre, slot, z, gate, order, *weights = ctx.saved_tensors
        in_v, out_u, *vectors = weights
        grid = (max(1, -(-len(slot) // _SPLIT)), -(-d_hidden.shape[1] // _RUN))
        d_pre, d_gate_W = torch.empty_like(pre), gate.new_zeros(grid[1], *gate.shape)
        d_z_W = gate.new_zeros(grid[1], *gate.shape, z.shape[2])
        d_weights_S = [None if w is None else gate.new_zeros(grid[0], *w.shape) for w in weights]
        inputs = (pre, slot, z, gate, order, _plain(in_v), _plain(out_u), *vectors)
        outputs = (d_hidden.contiguous(), d_thin.contiguous(), d_pre, d_z_W, d_gate_W, *d_weights_S)
        _launch("backward", grid, (*inputs, *outputs), z.shape, slot, d_hidden.shape[1], {})
        d_z = _by_expert(d_z_W.sum(0), slot, z.shape[1]).to(z.dtype)
        sums = (d if d is None else d.sum(0).to(w.dtype) for d, w in zip(d_weights_S, weights, strict=True))
        return d_pre, None, d_z, d_gate_W.sum(0), *sums


def _forward(
    routed: tuple[Tensor, ...], order: Tensor, in_v: Factor, out_u: Factor, vectors: Vectors, packing: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    pre, slot, z, gate = routed
    width = pre.shape[1] // 2
    grid = (-(-len(slot) // _TILE["B"]), -(-width // _RUN))
    hidden = pre.new_empty(len(slot), width)
    thin_W = gate.new_zeros(grid[1], *slot.shape, z.shape[2] // 2)
    arguments = (*routed, order, in_v, out_u, *vectors, hidden, thin_W)
    _launch("forward", grid, arguments, z.shape, slot, width, {"bits": packing[0], "group": packing[1]})
    return hidden, _by_expert(thin_W.sum(0), slot, z.shape[1]).to(pre.dtype)


def _launch(
    name: str,
    grid: tuple[int, int],
    arguments: tuple[Any, ...],
    shape: tuple[int, ...],
    slot: Tensor,
    width: int,
    options: dict[str, int],
) -> None:
    """Launch a kernel, unless there are no tokens.

    Args:
        shape: shape of z, [T, N, C].
        options: further compile-time constants.
    """
    if not len(slot):
        return
    chosen = constants(shape[2] // 2, slot.shape[1]) | options
    with torch.cuda.device_of(slot):
        getattr(_kernels(), name)[grid](*arguments, *shape[:2], slot.shape[1], width, _RUN, **chosen)


def constants(rank: int, slots: int) -> dict[str, Any]:
    """Return the compile-time constants of both kernels; float32 products follow torch's matmul precision."""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {"rank": rank, "J": max(16, _power_of_two(rank)), "P": _power_of_two(slots), "precision": precision, **_TILE}


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels at their first use: importing Triton takes half a second, and a CPU does not need it."""
    return importlib.import_module("moe_dist.kernels.lowrank_swiglu_triton_kernels")


def _order(slot_TK: Tensor) -> Tensor:
    """Return the order [T] that sorts tokens by their set of experts."""
    bit_TK = torch.ones_like(slot_TK, dtype=torch.int64) << (slot_TK.clamp(min=0).long() % _SET_BITS)
    return torch.argsort(torch.where(slot_TK >= 0, bit_TK, 0).sum(1), stable=True)


def _by_expert(thin_TKR: Tensor, slot_TK: Tensor, experts: int) -> Tensor:
    """Scatter the slots' rows to their experts [T, N, R], zero for experts not chosen; absent slots hold zeros."""
    index_TKR = slot_TK.clamp(min=0).long()[:, :, None].expand_as(thin_TKR)
    thin_TNR = thin_TKR.new_zeros(len(slot_TK), experts, thin_TKR.shape[2])
    return thin_TNR.scatter_add(1, index_TKR, thin_TKR)


def _plain(factor: Tensor) -> Factor:
    return factor, None, None


def _as_float32(vectors: Vectors | None) -> Vectors:
    scale_NF, bias_NH = vectors or (None, None)
    if scale_NF is None or bias_NH is None:
        return None, None
    return scale_NF.float().contiguous(), bias_NH.float().contiguous()


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
