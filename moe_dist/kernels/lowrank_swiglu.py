"""Signature of a low-rank SwiGLU backend; `shared_base_experts` has the definition.

Shapes: T tokens, K slots, N experts, F hidden width, H = 2 F (gate | up), R rank, C = 2 R; p gates, h hidden units.
"""

from collections.abc import Callable

from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights

# pre [T, H], z [T, N, C], slot [T, K], gate [T, K], weights -> sum_k p_k h_k [T, F], p_e (h_e U_e) [T, N, R]
LowRankSwiGLU = Callable[[Tensor, Tensor, Tensor, Tensor, ClusterWeights], tuple[Tensor, Tensor]]
