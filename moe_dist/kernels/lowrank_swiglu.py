"""What every backend of the hidden step takes and gives (`shared_base`)."""

from collections.abc import Callable

from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights

# pre [T, H], z [T, N, C], slot [T, K], gate [T, K], weights -> sum_k p_k h_k [T, F], p_e (h_e U_e) [T, N, R]
LowRankSwiGLU = Callable[[Tensor, Tensor, Tensor, Tensor, ClusterWeights], tuple[Tensor, Tensor]]
