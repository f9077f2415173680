"""Low-rank SwiGLU of clustered experts on their shared base: reference, masked, sorted, C and Triton backends."""

from moe_dist.kernels.packed_experts import packed_experts
from moe_dist.kernels.shared_base_experts import BACKENDS, choose_backend, clustered_experts

__all__ = ["BACKENDS", "choose_backend", "clustered_experts", "packed_experts"]
