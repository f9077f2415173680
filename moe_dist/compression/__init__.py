"""Structured compression of experts: a base shared by a cluster and a low-rank residual for each expert."""

from moe_dist.compression.alignment import UnitOrder, align_hidden_units
from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.compression.expert_matrices import ExpertMatrices, relative_error
from moe_dist.compression.factorization import (
    FactorisedCluster,
    FactorisedExpert,
    factorise_cluster,
    factorise_expert,
    usage_weighted_mean,
)
from moe_dist.compression.initialisation import ExpertResidual, init_base, init_residual
from moe_dist.compression.whitening import InputRoots
from moe_dist.compression.quantized_cluster import PackedCluster, PackedExperts, StoredForm, as_stored, long_axis
from moe_dist.compression.quantization import GroupFormat, PackedFactor
from moe_dist.kernels.shared_base_experts import FORMS, choose_form, clustered_experts
from moe_dist.kernels.packed_experts import stored_experts

__all__ = [
    "FORMS",
    "ClusterWeights",
    "ExpertMatrices",
    "ExpertResidual",
    "FactorisedCluster",
    "FactorisedExpert",
    "GroupFormat",
    "InputRoots",
    "PackedCluster",
    "PackedExperts",
    "PackedFactor",
    "StoredForm",
    "UnitOrder",
    "align_hidden_units",
    "as_stored",
    "choose_form",
    "clustered_experts",
    "factorise_cluster",
    "factorise_expert",
    "init_base",
    "init_residual",
    "long_axis",
    "relative_error",
    "stored_experts",
    "usage_weighted_mean",
]
