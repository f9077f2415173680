"""Experts of one cluster on their shared base: its GEMMs are done once per token, whatever k is, and exactly.

    pre_k = x B_in + (x U_k) V_k             x B_in once
    y     = (sum_k p_k h_k) B_out + sum_k p_k (h_k U'_k) V'_k + sum_k p_k b_k        B_out once, by linearity

Between the two lines lies the *low-rank SwiGLU*, which has several backends, a file each (`lowrank_swiglu_*.py`):
given `pre = x B_in` and `z = x U` of all experts, it returns `sum_k p_k h_k` and the thin `p_e (h_e U'_e)`.

Shapes: T tokens, K slots of a token, N experts of the cluster, D model width, F hidden width, H = 2 F (gate | up),
R rank, C = 2 R, Q columns of all experts' thin factors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights, OuterWeights
from moe_dist.errors import ConfigError
from moe_dist.kernels import lowrank_swiglu_cpu as hidden_compiled
from moe_dist.kernels import lowrank_swiglu_triton as hidden_triton
from moe_dist.kernels.lowrank_swiglu import LowRankSwiGLU
from moe_dist.kernels.lowrank_swiglu_masked import lowrank_swiglu_masked
from moe_dist.kernels.lowrank_swiglu_sorted import lowrank_swiglu_sorted
from moe_dist.kernels.reference import clustered_experts_reference

KERNELS: dict[str, LowRankSwiGLU] = {
    "masked": lowrank_swiglu_masked,
    "sorted": lowrank_swiglu_sorted,
    "cpu": hidden_compiled.lowrank_swiglu_cpu,
    "triton": hidden_triton.lowrank_swiglu_triton,
}
BACKENDS = ("auto", *KERNELS, "reference")
_LIMITED = {"cpu": hidden_compiled, "triton": hidden_triton}


def clustered_experts(
    x_TD: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights, backend: str = "auto"
) -> Tensor:
    """`y[t] = sum_k gate[t, k] * expert_{slot[t, k]}(x[t])` [T, D], differentiable in x, gate and all weights.

    `slot_TK` holds integers in [-1, n): -1 is an absent slot, and an expert comes at most once in a row. T may be 0.
    `gate_TK` may be float32 beside a bfloat16 x. `backend`: one of FORMS; only auto chooses what is available.

    Raises:
        ConfigError: the backend is 'cpu' or 'triton', and this machine, device, dtype or shape cannot have it.
    """
    if backend == "reference":
        return clustered_experts_reference(x_TD, slot_TK, gate_TK, weights)
    step = KERNELS[resolve_backend(backend, x_TD, weights.experts, weights.rank, weights.expert_hidden)]
    return apply_shared_base(
        x_TD, slot_TK, gate_TK, weights.outer(), lambda pre, z: step(pre, z, slot_TK, gate_TK, weights)
    )


def apply_shared_base(
    x_TD: Tensor,
    slot_TK: Tensor,
    gate_TK: Tensor,
    outer: OuterWeights,
    hidden_step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """The two lines above, around a hidden step of (pre, z)."""
    experts, _, columns = outer.in_u_NDR.shape
    u_DQ = outer.in_u_NDR.transpose(0, 1).flatten(1)
    z_TNC = (x_TD @ u_DQ).view(x_TD.shape[0], experts, columns)
    hidden_TF, thin_TNR = hidden_step(x_TD @ outer.base_in_DH, z_TNC)
    thin_TQ, v_QD = thin_TNR.flatten(1), outer.out_v_NRD.flatten(0, 1)
    if outer.output_bias_ND is not None:
        thin_TQ = torch.cat([thin_TQ, _gates_by_expert(slot_TK, gate_TK, experts).to(x_TD.dtype)], dim=1)
        v_QD = torch.cat([v_QD, outer.output_bias_ND])
    return torch.addmm(hidden_TF @ outer.base_out_FD, thin_TQ, v_QD)


def resolve_backend(backend: str, x_TD: Tensor, experts: int, rank: int, width: int) -> str:
    """The backend that `backend` asks for.

    Raises:
        ConfigError: it is not available for this x and these sizes.
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
    """The fastest backend for this device, dtype and shape: 'cpu' or 'triton' where it exists, or 'masked' or 'sorted'.

    Measured on a busy CPU, forward + backward, d 128 and 512, n r from 16 to 128, k 1 to 4: compiled beat the better of
    the others everywhere, by 1.05 to 1.9 times; mask beat sort by up to 1.4 times at n r = 16, either won by up to a
    fifth from 32 to 64, and sort beat mask by up to 1.6 times at 128. A GPU takes triton, or else mask, since they need
    no synchronisation with the host; that choice has not been measured (ADR 17).
    """
    return _fastest(device, dtype, weights.experts, weights.rank, weights.expert_hidden)


def _fastest(device: torch.device, dtype: torch.dtype, experts: int, rank: int, width: int) -> str:
    own = "cpu" if device.type == "cpu" else "triton"
    if _LIMITED[own].available(device, dtype, rank, width):
        return own
    return "masked" if device.type != "cpu" or experts * rank <= 32 else "sorted"


def _gates_by_expert(slot_TK: Tensor, gate_TK: Tensor, experts: int) -> Tensor:
    """[T, N]: the gate of each expert a token chose, 0 for the others."""
    gates_TN = gate_TK.new_zeros(gate_TK.shape[0], experts)
    return gates_TN.scatter_add(1, slot_TK.clamp(min=0).long(), gate_TK * (slot_TK >= 0))
