"""Two-stage routing: each token chooses its clusters first, then experts inside each of them.

Both stages use the router's expert embeddings, one row per expert: stage two the rows themselves, stage one cluster
*prototypes* computed from them. Selection biases affect the choice but not the gates (auxiliary-loss-free balancing,
Wang et al. 2024). All router arithmetic is in float32.

Shapes: T tokens, R rows at a cluster, E experts, G clusters, M chosen clusters, N experts of a cluster, K chosen
experts, D hidden.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.moe.scoring import PLAIN, Scoring


class ExpertChoice(NamedTuple):
    """Decision of stage two for the rows of one cluster."""

    slot_RK: Tensor
    """Chosen slots, int64."""
    gate_RK: Tensor
    """Weights of the chosen experts within the cluster, float32."""
    log_mass_R: Tensor
    """Logsumexp of the logits in the gates' softmax, float32, which weights this cluster against the token's others."""


def router_logits(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """Return logits in float32 or wider for every compute dtype, since rounding would change choices."""
    return torch.nn.functional.linear(_at_least_float32(x_TD), _at_least_float32(weight_ND))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cluster_prototypes(embedding_ED: Tensor, member_GN: Tensor) -> Tensor:
    """Return the prototype of each cluster [G, D]: the sum of its experts' embeddings over sqrt(N), float32.

    It has the direction of their mean and the scale of one embedding, so that the logits of both stages have a similar
    magnitude for any N.
    """
    total_GD = _at_least_float32(embedding_ED)[member_GN].sum(dim=1)
    return total_GD / math.sqrt(member_GN.shape[1])


def choose_clusters(logits_TG: Tensor, bias_G: Tensor, top_clusters: int) -> Tensor:
    """Choose the `top_clusters` largest of logit + bias (stage one); return cluster_TM, int64."""
    if top_clusters == 1:
        return (logits_TG.detach() + bias_G).argmax(dim=-1, keepdim=True)
    return (logits_TG.detach() + bias_G).topk(top_clusters, dim=-1).indices


def single_cluster_gate(logits_TG: Tensor, cluster_T1: Tensor) -> Tensor:
    """Return the gate of the one chosen cluster, gate_T1: 1, with the gradient of log softmax(logits)[cluster].

    A softmax over one chosen cluster has no gradient. Its probability over all clusters has one, but makes the scale of
    the layer's output depend on the router's confidence, which cost 0.2 nats (docs/LOG.md).
    """
    log_probability_T1 = logits_TG.log_softmax(dim=-1).gather(-1, cluster_T1)
    return (log_probability_T1 - log_probability_T1.detach()).exp()


def choose_experts(
    logits_RN: Tensor,
    bias_N: Tensor,
    top_k: int,
    only_gate: bool,
    normalize: bool = True,
    scoring: Scoring = PLAIN,
) -> ExpertChoice:
    """Choose the `top_k` largest of score + bias within one cluster (stage two).

    Args:
        only_gate: True if `gate_RK` is the only source of the router's gradient (M=1). With K=1 the gate is then 1 with
            the gradient of log softmax over all experts of the cluster, since a softmax over one logit has none.
        normalize: gates are a softmax over the chosen experts; False: over all experts of the cluster.
    """
    slot_RK = scoring.selection(logits_RN, bias_N).topk(top_k, dim=-1).indices
    logits_RN = scoring.log_gates(logits_RN)
    if not normalize:
        return ExpertChoice(slot_RK, logits_RN.softmax(-1).gather(-1, slot_RK), logits_RN.logsumexp(-1))
    chosen_RK = logits_RN.gather(-1, slot_RK)
    gate_RK = chosen_RK.softmax(dim=-1)
    if only_gate and top_k == 1:
        gate_RK = single_cluster_gate(logits_RN, slot_RK)
    return ExpertChoice(slot_RK, gate_RK, chosen_RK.logsumexp(dim=-1))
