"""Low-rank SwiGLU, backend 'masked': one GEMM over all experts' low-rank factors, with unchosen experts zeroed.

Device-agnostic torch without host synchronization: the backend for a GPU that does not support 'triton'. It computes
n r columns where k r are needed, and stores a copy of the hidden units for each slot.

Shapes: T tokens, K slots, N experts of the cluster, R rank, F hidden width, H = 2 F (gate | up), C = 2 R, Q = N R.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.compression.cluster_weights import ClusterWeights


def lowrank_swiglu_masked(
    pre_TH: Tensor, z_TNC: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights
) -> tuple[Tensor, Tensor]:
    """Return `sum_k p_k h_k` [T, F] and `p_e (h_e U_e)` [T, N, R], zero for experts not chosen (`LowRankSwiGLU`)."""
    experts, rank, width = weights.experts, weights.rank, weights.expert_hidden
    v_gate_QF, v_up_QF = weights.in_v_NRH.transpose(0, 1).flatten(1, 2)
    u_FQ = weights.out_u_NFR.transpose(0, 1).flatten(1)
    vectors = weights.vectors()
    expert_N = torch.arange(experts, device=slot_TK.device)
    hidden_TF, thin_TNR = pre_TH.new_zeros(pre_TH.shape[0], width), pre_TH.new_zeros(*z_TNC.shape[:2], rank)
    for slot_T, gate_T in zip(slot_TK.unbind(1), gate_TK.to(pre_TH.dtype).unbind(1), strict=True):
        chosen_TN = (slot_T[:, None] == expert_N).to(pre_TH.dtype)
        z_gate_TNR, z_up_TNR = (z_TNC * chosen_TN[:, :, None]).chunk(2, dim=2)
        gate_TF = torch.addmm(pre_TH[:, :width], z_gate_TNR.flatten(1), v_gate_QF)
        up_TF = torch.addmm(pre_TH[:, width:], z_up_TNR.flatten(1), v_up_QF)
        if vectors is not None:
            scale_TF, bias_TH = chosen_TN @ vectors[0], chosen_TN @ vectors[1]
            gate_TF, up_TF = gate_TF + bias_TH[:, :width], (up_TF + bias_TH[:, width:]) * scale_TF
        present_T = chosen_TN.sum(1)
        h_TF = functional.silu(gate_TF) * up_TF * (gate_T * present_T)[:, None]
        hidden_TF = hidden_TF + h_TF
        thin_TNR = thin_TNR + (h_TF @ u_FQ).view_as(thin_TNR) * chosen_TN[:, :, None]
    return hidden_TF, thin_TNR
