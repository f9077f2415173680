"""Two-stage routing: a token picks its clusters first, then experts inside each.

Both stages score against the router's expert embeddings, one row an expert: stage two against the rows themselves,
stage one against cluster *prototypes* made of them. Selection biases enter the choice only, never a gate
(auxiliary-loss-free balancing, Wang et al. 2024). All router arithmetic is in float32.

Shapes: T tokens, R rows at a cluster, E experts, G clusters, M chosen clusters, N experts of a cluster, K chosen
experts, D hidden.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ExpertChoice(NamedTuple):
    """What stage two decided for the rows of one cluster."""

    slot_RK: Tensor
    """Chosen slots, int64."""
    gate_RK: Tensor
    """Weights of the chosen experts within the cluster, float32."""
    log_mass_R: Tensor
    """logsumexp of the chosen experts' logits, float32: weighs this cluster against others of the token."""


def router_logits(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """Scores in float32 or better whatever the compute type: a router's rounding flips choices."""
    return torch.nn.functional.linear(_precise(x_TD), _precise(weight_ND))


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cluster_prototypes(embedding_ED: Tensor, member_GN: Tensor) -> Tensor:
    """Prototype of each cluster [G, D]: its experts' embeddings, summed, over sqrt(N), float32.

    Like the mean it points where the cluster's experts point; like one embedding it is of unit scale, so that the two
    stages' logits are alike in size whatever N is.
    """
    total_GD = _precise(embedding_ED)[member_GN].sum(dim=1)
    return total_GD / math.sqrt(member_GN.shape[1])


def choose_clusters(logits_TG: Tensor, bias_G: Tensor, top_clusters: int) -> Tensor:
    """Stage one: the `top_clusters` largest of logit + bias; returns cluster_TM, int64."""
    if top_clusters == 1:
        return (logits_TG.detach() + bias_G).argmax(dim=-1, keepdim=True)
    return (logits_TG.detach() + bias_G).topk(top_clusters, dim=-1).indices


def single_cluster_gate(logits_TG: Tensor, cluster_T1: Tensor) -> Tensor:
    """Gate of the one chosen cluster: 1, with the gradient of log softmax(logits)[cluster]; returns gate_T1.

    A softmax over one chosen cluster gives the router no gradient; its probability as the gate does, but ties the
    layer's output scale to the router's confidence, which cost 0.2 nats (docs/LOG.md).
    """
    log_probability_T1 = logits_TG.log_softmax(dim=-1).gather(-1, cluster_T1)
    return (log_probability_T1 - log_probability_T1.detach()).exp()


def choose_experts(logits_RN: Tensor, bias_N: Tensor, top_k: int, only_gate: bool) -> ExpertChoice:
    """Stage two, inside one cluster: the `top_k` largest of logit + bias.

    Args:
        only_gate: nothing but `gate_RK` gives the router a gradient (M=1). With K=1 the gate is then 1 with the
            gradient of log softmax over all experts of the cluster, since a softmax over one logit has none.
    """
    slot_RK = (logits_RN.detach() + bias_N).topk(top_k, dim=-1).indices
    chosen_RK = logits_RN.gather(-1, slot_RK)
    gate_RK = chosen_RK.softmax(dim=-1)
    if only_gate and top_k == 1:
        gate_RK = single_cluster_gate(logits_RN, slot_RK)
    return ExpertChoice(slot_RK, gate_RK, chosen_RK.logsumexp(dim=-1))
