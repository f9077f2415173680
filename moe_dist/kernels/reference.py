"""Reference implementation of clustered experts: one expert at a time, with its full weight. Slow; for tests.

Shapes: T tokens, K slots, L tokens of one expert, D model width, F hidden width, H = 2 F (gate | up).
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.compression.cluster_weights import ClusterWeights


def expert_weights(weights: ClusterWeights, e: int) -> tuple[Tensor, Tensor]:
    """Return `W = B + U V` of expert e: the input projection [D, 2F] (gate | up) and the output projection [F, D]."""
    u_gate, u_up = weights.in_u_NDR[e].chunk(2, dim=1)
    v_gate, v_up = weights.in_v_NRH[e]
    w_in_DH = weights.base_in_DH + torch.cat([u_gate @ v_gate, u_up @ v_up], dim=1)
    return w_in_DH, weights.base_out_FD + weights.out_u_NFR[e] @ weights.out_v_NRD[e]


def expert(x_LD: Tensor, weights: ClusterWeights, e: int) -> Tensor:
    """Apply one expert to its tokens: `(silu(gate) * up * (1 + tanh(hidden_gate))) W_out + output_bias`, [L, D]."""
    w_in_DH, w_out_FD = expert_weights(weights, e)
    pre_LH = x_LD @ w_in_DH
    if weights.hidden_bias_NH is not None:
        pre_LH = pre_LH + weights.hidden_bias_NH[e]
    gate_LF, up_LF = pre_LH.chunk(2, dim=1)
    h_LF = functional.silu(gate_LF) * up_LF
    if weights.hidden_gate_NF is not None:
        h_LF = h_LF * (1 + torch.tanh(weights.hidden_gate_NF[e]))
    y_LD = h_LF @ w_out_FD
    return y_LD if weights.output_bias_ND is None else y_LD + weights.output_bias_ND[e]


def clustered_experts_reference(x_TD: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ClusterWeights) -> Tensor:
    """Return `y[t] = sum_k gate[t, k] * expert_{slot[t, k]}(x[t])` [T, D]; a slot of -1 is absent."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(weights.experts):
        token_L, k_L = torch.nonzero(slot_TK == e, as_tuple=True)
        gate_L1 = gate_TK[token_L, k_L, None].to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token_L, gate_L1 * expert(x_TD[token_L], weights, e))
    return y_TD
