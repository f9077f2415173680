"""Experts of one cluster on their shared base: the base's GEMMs run once per token for any k; the result is exact.

    pre_k = x B_in + (x U_k) V_k             x B_in once
    y     = (sum_k p_k h_k) B_out + sum_k p_k (h_k U'_k) V'_k + sum_k p_k b_k        B_out once, by linearity

The step between the two lines is *low-rank SwiGLU*. It has several backends, one file each (`lowrank_swiglu_*.py`):
given `pre = x B_in` and `z = x U` of all experts, it returns `sum_k p_k h_k` and the low-rank `p_e (h_e U'_e)`.

Shapes: T tokens, K slots of a token, N experts of the cluster, D model width, F hidden width, H = 2 F (gate | up),
R rank, C = 2 R, Q columns of all experts' low-rank factors together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights, OuterWeights
from moe_dist.errors import ConfigError
from moe_dist.kernels import lowrank_swiglu_cpu, lowrank_swiglu_triton
from moe_dist.kernels.lowrank_swiglu import LowRankSwiGLU
from moe_dist.kernels.lowrank_swiglu_masked import lowrank_swiglu_masked
from moe_dist.kernels.lowrank_swiglu_sorted import lowrank_swiglu_sorted
from moe_dist.kernels.reference import clustered_experts_reference

KERNELS: dict[str, LowRankSwiGLU] = {
    "masked": lowrank_swiglu_masked,
    "sorted": lowrank_swiglu_sorted,
    "cpu": lowrank_swiglu_cpu.lowrank_swiglu_cpu,
    "triton": lowrank_swiglu_triton.lowrank_swiglu_triton,
}
BACKENDS = ("auto", *KERNELS, "reference")
_LIMITED = {"cpu": lowrank_swiglu_cpu, "triton": lowrank_swiglu_triton}
"""Modules of the backends that need certain devices, dtypes and shapes (`available`, `REQUIREMENTS`)."""


def clustered_experts(
    x_TD: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights, backend: str = "auto"
) -> Tensor:
    """Return `y[t] = sum_k gate[t, k] * expert_{slot[t, k]}(x[t])` [T, D], differentiable in x, gate and all weights.

    Args:
        x_TD: tokens; T may be 0.
        slot_TK: integers in [-1, n); -1 is an absent slot, and an expert occurs at most once in a row.
        gate_TK: gates; may be float32 with a bfloat16 x.
        backend: one of `BACKENDS`; 'auto' is `choose_backend`'s.

    Raises:
        ConfigError: the backend is 'cpu' or 'triton' and does not support this machine, device, dtype or shape.
    """
    if backend == "reference":
        return clustered_experts_reference(x_TD, slot_TK, gate_TK, weights)
    kernel = KERNELS[resolve_backend(backend, x_TD, weights.experts, weights.rank, weights.expert_hidden)]
    return apply_shared_base(
        x_TD, slot_TK, gate_TK, weights.outer(), lambda pre, z: kernel(pre, z, slot_TK, gate_TK, weights)
    )


def apply_shared_base(
    x_TD: Tensor,
    slot_TK: Tensor,
    gate_TK: Tensor,
    outer: OuterWeights,
    lowrank_swiglu: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Compute pre and z, apply `lowrank_swiglu(pre, z)`, and project its results back; return y_TD.

    The module's docstring has the formulas.
    """
    experts, _, columns = outer.in_u_NDR.shape
    u_DQ = outer.in_u_NDR.transpose(0, 1).flatten(1)
    z_TNC = (x_TD @ u_DQ).view(x_TD.shape[0], experts, columns)
    hidden_TF, thin_TNR = lowrank_swiglu(x_TD @ outer.base_in_DH, z_TNC)
    thin_TQ, v_QD = thin_TNR.flatten(1), outer.out_v_NRD.flatten(0, 1)
    if outer.output_bias_ND is not None:
        thin_TQ = torch.cat([thin_TQ, _gates_by_expert(slot_TK, gate_TK, experts).to(x_TD.dtype)], dim=1)
        v_QD = torch.cat([v_QD, outer.output_bias_ND])
    return torch.addmm(hidden_TF @ outer.base_out_FD, thin_TQ, v_QD)


def resolve_backend(backend: str, x_TD: Tensor, experts: int, rank: int, width: int) -> str:
    """Return the backend to use: `backend` itself, or the fastest available one for 'auto'.

    Raises:
        ConfigError: the backend is not available for this x and these sizes.
    """
    if backend == "auto":
        return _fastest(x_TD.device, x_TD.dtype, experts, rank, width)
    if backend in _LIMITED and not _LIMITED[backend].available(x_TD.device, x_TD.dtype, rank, width):
        raise ConfigError(
            f"moe.backend={backend} is not available for {x_TD.dtype} on {x_TD.device.type} with moe.expert_hidden="
            f"{width} and moe.rank={rank}: {_LIMITED[backend].REQUIREMENTS}; or use moe.backend=auto"
        )
    return backend


def choose_backend(device: torch.device, dtype: torch.dtype, weights: ClusterWeights) -> str:
    """Return the default backend for this device, dtype and shape; `backend_choice.py` measures instead.

    It is 'cpu' or 'triton' where it is available, else 'masked' or 'sorted'. Measured on a busy CPU, forward +
    backward, d 128 and 512, n r from 16 to 128, k 1 to 4: 'cpu' was always the fastest, by a factor of 1.05 to 1.9.
    'masked' was up to 1.4 times faster than 'sorted' at n r = 16, either was faster by up to a fifth from 32 to 64, and
    'sorted' was up to 1.6 times faster at 128. A GPU uses 'triton', else 'masked', because they need no host
    synchronization; that choice has not been measured (ADR 17).
    """
    return _fastest(device, dtype, weights.experts, weights.rank, weights.expert_hidden)


def available_backends(device: torch.device, dtype: torch.dtype, rank: int, width: int) -> list[str]:
    """Return the backends that work for this device, dtype and shape, without the reference."""
    limited = {name for name, module in _LIMITED.items() if not module.available(device, dtype, rank, width)}
    return [name for name in KERNELS if name not in limited]


def _fastest(device: torch.device, dtype: torch.dtype, experts: int, rank: int, width: int) -> str:
    own = "cpu" if device.type == "cpu" else "triton"
    if _LIMITED[own].available(device, dtype, rank, width):
        return own
    return "masked" if device.type != "cpu" or experts * rank <= 32 else "sorted"


def _gates_by_expert(slot_TK: Tensor, gate_TK: Tensor, experts: int) -> Tensor:
    """Scatter the gates to their experts [T, N], 0 for experts not chosen."""
    gates_TN = gate_TK.new_zeros(gate_TK.shape[0], experts)
    return gates_TN.scatter_add(1, slot_TK.clamp(min=0).long(), gate_TK * (slot_TK >= 0))
