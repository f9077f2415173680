"""Structured compression of experts: a base shared by a cluster and a low-rank residual for each expert."""

from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.compression.initialisation import ExpertResidual, init_base, init_residual
from moe_dist.compression.shared_base import FORMS, choose_form, clustered_experts

__all__ = [
    "FORMS",
    "ClusterWeights",
    "ExpertResidual",
    "choose_form",
    "clustered_experts",
    "init_base",
    "init_residual",
]
