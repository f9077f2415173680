"""Experts of one cluster computed from their quantized form; codes are unpacked where they are used.

Shapes: T tokens, K slots, D model width, N experts, F hidden width, H = 2 F, R rank.
"""

import torch
from torch import Tensor

from moe_dist.compression.cluster_weights import OuterWeights, hidden_vectors
from moe_dist.compression.quantized_cluster import QuantizedCluster
from moe_dist.kernels.lowrank_swiglu_triton import lowrank_swiglu_packed
from moe_dist.kernels.shared_base_experts import apply_shared_base, clustered_experts, resolve_backend


def packed_experts(
    x_TD: Tensor, slot_TK: Tensor, gate_TK: Tensor, packed: QuantizedCluster, backend: str = "auto"
) -> Tensor:
    """Return `clustered_experts` of `packed.weights(x.dtype)`, bit-identically; differentiable in x and gate.

    With backend 'triton' and no gradient, the kernel unpacks the two factors of low-rank SwiGLU in registers. The two
    factors around it feed GEMMs and are unpacked before the pass, as in other backends.

    Raises:
        ConfigError: the backend is not available (`clustered_experts`).
    """
    factors, dtype = packed.experts.factors, x_TD.dtype
    in_v, out_u = factors["in_v_NRH"], factors["out_u_NFR"]
    experts, _, rank, width = in_v.shape
    needs_gradient = torch.is_grad_enabled() and (x_TD.requires_grad or gate_TK.requires_grad)
    if needs_gradient or backend == "reference" or resolve_backend(backend, x_TD, experts, rank, width) != "triton":
        return clustered_experts(x_TD, slot_TK, gate_TK, packed.weights(dtype), backend)
    vectors = {name: vector.to(dtype) for name, vector in packed.experts.vectors.items()}
    inner = hidden_vectors(vectors.get("hidden_gate_NF"), vectors.get("hidden_bias_NH"))
    outer = OuterWeights(
        packed.base_in_DH.to(dtype),
        packed.base_out_FD.to(dtype),
        factors["in_u_NDR"].unpacked(dtype),
        factors["out_v_NRD"].unpacked(dtype),
        vectors.get("output_bias_ND"),
    )

    def lowrank_swiglu(pre_TH: Tensor, z_TNC: Tensor) -> tuple[Tensor, Tensor]:
        return lowrank_swiglu_packed(pre_TH, z_TNC, slot_TK, gate_TK, (in_v, out_u), inner)

    return apply_shared_base(x_TD, slot_TK, gate_TK, outer, lowrank_swiglu)
