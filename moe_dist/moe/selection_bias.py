"""Selection biases for load balancing without a loss: each step lowers those of overloaded experts and clusters.

Shapes: L layers, E experts, G clusters. Source: auxiliary-loss-free balancing (Wang et al. 2024), here in two stages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def update_expert_bias(bias_LE: Tensor, count_LE: Tensor, rate: float) -> None:
    """Update the biases of standard routing in place: b_e += rate * sign(mean load - load_e)."""
    count_LE = count_LE.to(bias_LE.dtype)
    bias_LE += rate * torch.sign(count_LE.mean(dim=-1, keepdim=True) - count_LE)


def update_two_stage_bias(
    cluster_bias_LG: Tensor,
    expert_bias_LE: Tensor,
    count_LE: Tensor,
    members: Sequence[Sequence[Sequence[int]]],
    rate: float,
) -> None:
    """Update the biases of two-stage routing in place.

    A cluster's bias follows its share of all copies, an expert's bias its share within the cluster:
    b_c += rate * sign(1/G - load_c), b_e += rate * sign(G/E - load_e / load_c). Biases of the experts of a cluster
    without load do not change.

    Args:
        members: experts of each cluster of each layer, [L, G, N].
    """
    member_LE = torch.tensor(members, device=count_LE.device).flatten(1)
    count_LGN = count_LE.to(expert_bias_LE.dtype).gather(1, member_LE).unflatten(1, (cluster_bias_LG.shape[1], -1))
    count_LG = count_LGN.sum(dim=-1)
    cluster_bias_LG += rate * torch.sign(count_LG.mean(dim=-1, keepdim=True) - count_LG)
    step_LGN = rate * torch.sign(count_LGN.mean(dim=-1, keepdim=True) - count_LGN)
    expert_bias_LE.scatter_add_(1, member_LE, step_LGN.flatten(1))
