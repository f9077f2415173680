"""Low-rank SwiGLU, backend 'sorted': rows of chosen slots sorted by expert, with low-rank GEMMs for each expert.

It does no work for experts that were not chosen, but synchronizes with the host to read the rows per expert.

Shapes: T tokens, K slots, P present slots sorted by expert, L of them of one expert, N experts of the cluster, R rank,
F hidden width, H = 2 F (gate | up), C = 2 R.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.compression.cluster_weights import ClusterWeights


def lowrank_swiglu_sorted(
    pre_TH: Tensor, z_TNC: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights
) -> tuple[Tensor, Tensor]:
    """Return `sum_k p_k h_k` [T, F] and `p_e (h_e U_e)` [T, N, R], zero for experts not chosen (`LowRankSwiGLU`)."""
    absent, *counts = torch.bincount(slot_TK.flatten() + 1, minlength=weights.experts + 1).tolist()
    order_P = torch.argsort(slot_TK.flatten(), stable=True)[absent:]
    token_P, expert_P = order_P // slot_TK.shape[1], slot_TK.flatten()[order_P]
    pre_P, z_P = torch.split(pre_TH[token_P], counts), torch.split(z_TNC[token_P, expert_P], counts)
    gate_P = torch.split(gate_TK.to(pre_TH.dtype).flatten()[order_P, None], counts)
    vectors = weights.vectors()
    h_P, thin_P = [], []
    for e, (pre_LH, z_LC, gate_L1) in enumerate(zip(pre_P, z_P, gate_P, strict=True)):
        projected_LH = pre_LH + torch.cat(
            [z @ v for z, v in zip(z_LC.chunk(2, 1), weights.in_v_NRH[e], strict=True)], 1
        )
        if vectors is not None:
            projected_LH = projected_LH + vectors[1][e]
        gate_LF, up_LF = projected_LH.chunk(2, dim=1)
        h_LF = functional.silu(gate_LF) * up_LF * gate_L1
        h_P.append(h_LF if vectors is None else h_LF * vectors[0][e])
        thin_P.append(h_P[-1] @ weights.out_u_NFR[e])
    hidden_TF = pre_TH.new_zeros(pre_TH.shape[0], weights.expert_hidden).index_add(0, token_P, torch.cat(h_P))
    thin_TNR = pre_TH.new_zeros(*z_TNC.shape[:2], weights.rank).index_put((token_P, expert_P), torch.cat(thin_P))
    return hidden_TF, thin_TNR
