"""The clustered layer as its definition reads: one token, one expert at a time. Slow; it tests the fast path.

    m = 1:  y = s * sum over chosen e of softmax over chosen (l)_e * expert_e(x)
    m > 1:  y = s * sum over all chosen e of softmax over all chosen (c_g(e) + l_e) * expert_e(x)

l_e = x . v_e, c_g = x . sum over e in g of v_e / sqrt(N), with v_e the expert's embedding; s: `moe.gate_scale`. Chosen
are the largest logit + bias. Where a softmax is over one logit alone the gate is 1 with the gradient of
log softmax over all: m = 1 for the cluster, m = k = 1 for the expert. For the cluster, what the tokens of a sequence
that chose it gain on average is taken from that gradient.
"""

import torch
from torch import Tensor

from moe_dist.kernels.reference import expert
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.quantized_experts import QuantizedClusterExperts


def clustered_moe_reference(layer: ClusteredMoE, x_TD: Tensor) -> Tensor:
    """What `layer`, holding all clusters on one rank and dropping nothing, makes of one sequence."""
    outputs, gates, choices = zip(*(_one_token(layer, x_D) for x_D in x_TD), strict=True)
    gate_T = torch.stack(gates)
    if gate_T.requires_grad:
        gate_T.register_hook(lambda grad_T: _less_mean_of_peers(grad_T, choices))
    return torch.stack(outputs) * gate_T[:, None]


def _less_mean_of_peers(grad_T: Tensor, choices: tuple[int, ...]) -> Tensor:
    peers = [[u for u, other in enumerate(choices) if other == choice] for choice in choices]
    return torch.stack([grad_T[t] - grad_T[peers[t]].mean() for t in range(len(choices))])


def _one_token(layer: ClusteredMoE, x_D: Tensor) -> tuple[Tensor, Tensor, int]:
    """A token's output, the gate of its cluster (1), and its first cluster."""
    members = [list(cluster) for cluster in layer.placement.members]
    prototypes = [layer.router.weight_ED[experts].sum(0) / len(experts) ** 0.5 for experts in members]
    cluster_logit_G = torch.stack([prototype_D @ x_D for prototype_D in prototypes])
    bias_G = layer.balance.cluster_bias_LG[layer.layer]
    chosen = (cluster_logit_G.detach() + bias_G).topk(layer.moe.top_clusters).indices.tolist()
    outputs, logits = [], []
    for cluster in chosen:
        for expert_logit, output in _experts_of(layer, cluster, x_D):
            outputs.append(output)
            logits.append(expert_logit if len(chosen) == 1 else cluster_logit_G[cluster] + expert_logit)
    y_D = torch.stack(logits).softmax(dim=0) @ torch.stack(outputs)
    one = torch.ones_like(cluster_logit_G[0])
    gate = _one_with_gradient(cluster_logit_G, chosen[0]) if len(chosen) == 1 else one
    return layer.moe.gate_scale * y_D, gate, chosen[0]


def _experts_of(layer: ClusteredMoE, cluster: int, x_D: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(logit, output) of the experts that a token chooses inside one cluster."""
    part = layer.clusters[cluster]
    assert isinstance(part, ClusteredExperts | QuantizedClusterExperts)
    members = torch.tensor(layer.placement.members[cluster])
    logit_N = layer.router.weight_ED[members] @ x_D
    bias_N = layer.balance.expert_bias_LE[layer.layer][members]
    slots = (logit_N.detach() + bias_N).topk(layer.moe.top_k).indices.tolist()
    outputs = [expert(x_D[None], part.weights(), slot)[0] for slot in slots]
    if layer.moe.top_clusters == layer.moe.top_k == 1:
        outputs = [outputs[0] * _one_with_gradient(logit_N, slots[0])]
    return [(logit_N[slot], output) for slot, output in zip(slots, outputs, strict=True)]


def _one_with_gradient(logits: Tensor, index: int) -> Tensor:
    probability = logits.softmax(dim=0)[index]
    return probability / probability.detach()
