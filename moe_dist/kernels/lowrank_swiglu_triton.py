"""The hidden step, form 'triton': low-rank correction, SwiGLU, vectors and weighted sum in one kernel of a GPU.

As the C operator does in the cache (`hidden_compiled`), it holds a tile of the hidden units in registers and recomputes
it in the backward pass, so that no tensor of [tokens, k, hidden] exists: `pre` is read once, `hidden` written once. The
GEMMs around it are the library's (ADR 17). Float32, bfloat16 and float16, with arithmetic and sums in float32.

Tokens are visited in an order that brings those with the same experts together: a block of them then has about k
experts to visit. The order needs no synchronisation with the host, and rows of a block are read whole, so that it costs
no bandwidth.

Run in Triton's interpreter and compiled for GPUs, but never run on one, and never timed. So before they are first
used on a device they are held against backend 'masked' there (`kernel_selftest`), and not used if they differ.

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

Factor = tuple[Tensor, Tensor | None, Tensor | None]  # numbers, or codes, scales and zero points
Vectors = tuple[Tensor, Tensor] | tuple[None, None]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_RANK = 64  # a block's registers
_CAPABILITY = 8  # of the GPU: bfloat16 in its matrix units
_SPLIT = 512  # tokens whose gradients of factors are added up by one program
_SET_BITS = 62  # of a set of experts in an int64
_RUN = 256  # columns that one program takes
_TILE = {"B": 32, "L": 32, "num_warps": 4}  # next to no register is spilled (Triton 3.9, sm_80, bfloat16, rank 8)
REQUIREMENTS = (
    f"it needs triton, a GPU of compute capability {_CAPABILITY} (or TRITON_INTERPRET=1), float32, bfloat16 or "
    f"float16, a rank up to {_MAX_RANK}, and kernels that agree with backend 'masked' there"
)
_logger = logging.getLogger(__name__)


def available(device: torch.device, dtype: torch.dtype, rank: int, width: int) -> bool:
    """Whether the kernels do what they should for this device, type and shape; tries them when first asked."""
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
    """Whether a small problem comes out as in backend 'masked', with its gradients; a warning says once why not."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        wrong = kernel_selftest(lowrank_swiglu_triton, device, dtype, rank)
    except Exception as error:  # whatever a compiler or a driver may raise
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        _logger.warning(
            "backend 'triton' is not used on %s, torch is: %s", device, wrong.strip().partition("\n")[0][:500]
        )
    return wrong is None


def lowrank_swiglu_triton(
    pre_TH: Tensor, z_TNC: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights
) -> tuple[Tensor, Tensor]:
    """`sum_k p_k h_k` [T, F] and `p_e (h_e U_e)` [T, N, R], zero for experts not chosen (`shared_base`)."""
    in_v_NRH, out_u_NRF = weights.in_v_NRH.contiguous(), weights.out_u_NFR.transpose(1, 2).contiguous()
    routed = (pre_TH.contiguous(), slot_TK.contiguous(), z_TNC.contiguous(), gate_TK.float().contiguous())
    outputs = _Hidden.apply(*routed, in_v_NRH, out_u_NRF, *_float(weights.vectors()))  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], outputs)


def lowrank_swiglu_packed(
    pre_TH: Tensor,
    z_TNC: Tensor,
    slot_TK: Tensor,
    gate_TK: Tensor,
    factors: tuple[QuantizedFactor, QuantizedFactor],
    vectors: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """`hidden_triton`, to the bit, of in_v_NRH and out_u_NFR as they are stored, unpacked in registers; no backward."""
    form = factors[0].format
    routed = (pre_TH.contiguous(), slot_TK.contiguous(), z_TNC.contiguous(), gate_TK.float().contiguous())
    in_v, out_u = ((x.codes_XB, x.scales_XG, x.zeros_XB) for x in factors)
    return _forward(routed, _order(slot_TK), in_v, out_u, _float(vectors), (form.bits, form.group_size))


class _Hidden(torch.autograd.Function):
    """All tensors contiguous; gate and vectors in float32, the others as `pre`; out_u is [N, R, F] here."""

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
    """`shape`: that of z [T, N, C]; without tokens there is nothing to launch."""
    if not len(slot):
        return
    chosen = constants(shape[2] // 2, slot.shape[1]) | options
    with torch.cuda.device_of(slot):
        getattr(_kernels(), name)[grid](*arguments, *shape[:2], slot.shape[1], width, _RUN, **chosen)


def constants(rank: int, slots: int) -> dict[str, Any]:
    """What both kernels are compiled for. Float32 is multiplied as exactly as torch is told to."""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {"rank": rank, "J": max(16, _power_of_two(rank)), "P": _power_of_two(slots), "precision": precision, **_TILE}


@functools.cache
def _kernels() -> ModuleType:
    """Imported at the first use: importing Triton takes half a second, and a CPU has no need of it."""
    return importlib.import_module("moe_dist.kernels.lowrank_swiglu_triton_kernels")


def _order(slot_TK: Tensor) -> Tensor:
    """The order [T] in which tokens are visited: by the set of their experts."""
    bit_TK = torch.ones_like(slot_TK, dtype=torch.int64) << (slot_TK.clamp(min=0).long() % _SET_BITS)
    return torch.argsort(torch.where(slot_TK >= 0, bit_TK, 0).sum(1), stable=True)


def _by_expert(thin_TKR: Tensor, slot_TK: Tensor, experts: int) -> Tensor:
    """[T, N, R]: what each slot has, zero for experts not chosen; absent slots hold zeros."""
    index_TKR = slot_TK.clamp(min=0).long()[:, :, None].expand_as(thin_TKR)
    thin_TNR = thin_TKR.new_zeros(len(slot_TK), experts, thin_TKR.shape[2])
    return thin_TNR.scatter_add(1, index_TKR, thin_TKR)


def _plain(factor: Tensor) -> Factor:
    return factor, None, None


def _float(vectors: Vectors | None) -> Vectors:
    scale_NF, bias_NH = vectors or (None, None)
    if scale_NF is None or bias_NH is None:
        return None, None
    return scale_NF.float().contiguous(), bias_NH.float().contiguous()


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
