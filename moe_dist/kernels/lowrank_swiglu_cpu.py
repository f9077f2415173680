"""Low-rank SwiGLU, backend 'cpu': a fused C operator (`lowrank_swiglu_cpu.c`).

It fuses the low-rank correction, SwiGLU, the expert vectors and the gated sum. Clustered experts are limited by the
memory traffic of k copies of the hidden units, not by arithmetic. The operator therefore keeps a tile of them in the
cache and recomputes it in the backward pass: no tensor of [tokens, k, hidden] is ever stored. CPU only, float32 and
bfloat16 (arithmetic and sums in float32).

Measured by `moe-dist bench layer` (d=512, f=1408, n=8, r=8, k=2, forward + backward), the layer takes 1.1 (float32)
and 1.3 (bfloat16) times as long as one dense layer of the same width; with the torch backends 1.3 and 1.5.

Columns are divided among torch's threads, and each thread has its own partial sums over its columns. Results depend on
the number of threads in the last digits only, and never on timing.

Shapes: T tokens, K slots, N experts of the cluster, R rank, F hidden width, H = 2 F (gate | up), C = 2 R, W threads.
"""

import ctypes
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.kernels import c_compiler as native

_SOURCE = Path(__file__).with_name("lowrank_swiglu_cpu.c")
_TILE = 128  # TILE of the C file: each thread's columns are a multiple of it
_LANES = 16  # the largest value of LANES in the C file
_MAX_RANK = 32  # larger factors and their gradients do not fit in L1 together
_DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("BFLOAT16",)}
REQUIREMENTS = (
    f"it needs a C compiler, a CPU, float32 or bfloat16, a width divisible by {_LANES} and a rank up to {_MAX_RANK}"
)
_NO_SUCH_EXPERT = 2  # status NO_SUCH_EXPERT of the C file


def available(device: torch.device, dtype: torch.dtype, rank: int, width: int) -> bool:
    """Return True if the operator supports this device, dtype and shape; the first call compiles it."""
    fits = width % _LANES == 0 and rank <= _MAX_RANK
    possible = native.enabled() and device.type == "cpu" and dtype in _DEFINES and fits
    return possible and _library(dtype, rank) is not None


def lowrank_swiglu_cpu(
    pre_TH: Tensor, z_TNC: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights
) -> tuple[Tensor, Tensor]:
    """Return `sum_k p_k h_k` [T, F] and `p_e (h_e U_e)` [T, N, R], zero for experts not chosen (`LowRankSwiGLU`)."""
    scale_NF, bias_NH = weights.vectors() or (None, None)
    out_u_NRF = weights.out_u_NFR.transpose(1, 2)
    thin = (_as_float32(x) for x in (z_TNC, gate_TK, weights.in_v_NRH, out_u_NRF, scale_NF, bias_NH))
    inputs = (pre_TH.contiguous(), slot_TK.long().contiguous(), *thin)
    outputs = _LowRankSwiGLUCpu.apply(*inputs)  # type: ignore[no-untyped-call]
    hidden_TF, thin_TNR = cast(tuple[Tensor, Tensor], outputs)
    return hidden_TF, thin_TNR.to(pre_TH.dtype)


def _as_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


class _LowRankSwiGLUCpu(torch.autograd.Function):
    """Autograd function of the C operator.

    All tensors are contiguous; `pre` and `hidden` keep their dtype, all others are float32. out_u is [N, R, F] here.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, slot: Tensor, z: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, slot, z, *rest)
        hidden = pre.new_empty(pre.shape[0], pre.shape[1] // 2)
        parts = _column_parts(hidden.shape[1])
        thin_W = z.new_zeros(len(parts), *z.shape[:2], z.shape[2] // 2)
        _run("forward", parts, (pre, slot, z, *rest), [(hidden, thin) for thin in thin_W])
        return hidden, _total(thin_W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor, d_thin: Tensor) -> tuple[Tensor | None, ...]:
        pre, slot, z, gate, *weights = ctx.saved_tensors
        parts = _column_parts(d_hidden.shape[1])
        d_pre, d_weights = torch.empty_like(pre), [None if w is None else torch.zeros_like(w) for w in weights]
        d_z_W, d_gate_W = z.new_zeros(len(parts), *z.shape), gate.new_zeros(len(parts), *gate.shape)
        given = (d_hidden.contiguous(), d_thin.contiguous(), d_pre)
        outputs = [(*given, d_z, d_gate, *d_weights) for d_z, d_gate in zip(d_z_W, d_gate_W, strict=True)]
        _run("backward", parts, (pre, slot, z, gate, *weights), outputs)
        return d_pre, None, _total(d_z_W), _total(d_gate_W), *d_weights


def _total(partial_W: Tensor) -> Tensor:
    return partial_W[0] if partial_W.shape[0] == 1 else partial_W.sum(0)


def _column_parts(hidden: int) -> list[tuple[int, int]]:
    """Return the columns [first, last) of each thread: whole tiles, divided as evenly as possible."""
    tiles = -(-hidden // _TILE)
    count = min(torch.get_num_threads(), tiles)
    return list(itertools.pairwise([*(tiles * i // count * _TILE for i in range(count)), hidden]))


def _run(
    name: str, parts: list[tuple[int, int]], inputs: tuple[Any, ...], outputs: list[tuple[Tensor | None, ...]]
) -> None:
    """Call the operator for each part of the columns, in parallel threads (ctypes releases the GIL).

    Raises:
        RuntimeError: the operator is not available.
        IndexError: a slot holds an expert that does not exist.
        MemoryError: there is no memory for the sorted slots.
    """
    pre, slot, z = inputs[:3]
    tokens, experts, columns = z.shape
    library = _library(pre.dtype, columns // 2)
    if library is None:
        raise RuntimeError("the backend 'cpu' is not available here: let choose_backend decide")
    operator, sizes = library[name], (tokens, experts, slot.shape[1], pre.shape[1] // 2)

    def call(part: tuple[int, int], output: tuple[Tensor | None, ...]) -> None:
        pointers = (None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (*inputs, *output))
        status = operator(*(ctypes.c_int64(size) for size in (*sizes, *part)), *pointers)
        if status == _NO_SUCH_EXPERT:
            raise IndexError(f"a slot is {slot.max().item()}, but the cluster has {experts} experts")
        if status:
            raise MemoryError(f"lowrank_swiglu_cpu.c: no memory to sort the slots of {tokens} tokens")

    if len(parts) == 1:
        call(parts[0], outputs[0])
    else:
        list(_threads(len(parts)).map(call, parts, outputs))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="lowrank-swiglu")


@functools.cache
def _library(dtype: torch.dtype, rank: int) -> ctypes.CDLL | None:
    return native.library(_SOURCE, (f"RANK={rank}", *_DEFINES[dtype]))
