"""Structured compression of experts: a base shared by a cluster and a low-rank residual for each expert."""

from moe_dist.compression.alignment import UnitOrder, align_hidden_units
from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.compression.expert_matrices import ExpertMatrices, relative_error
from moe_dist.compression.factorization import (
    FactorizedCluster,
    FactorizedExpert,
    factorize_cluster,
    factorize_difference,
    factorize_expert,
    usage_weighted_mean,
)
from moe_dist.compression.initialization import ExpertResidual, init_base, init_residual
from moe_dist.compression.quantization import GroupFormat, QuantizedFactor
from moe_dist.compression.quantized_cluster import (
    QuantizedCluster,
    QuantizedExperts,
    StorageFormat,
    fake_quantize,
    long_axis,
)
from moe_dist.compression.whitening import WhiteningRoots

__all__ = [
    "ClusterWeights",
    "ExpertMatrices",
    "ExpertResidual",
    "FactorizedCluster",
    "FactorizedExpert",
    "GroupFormat",
    "QuantizedCluster",
    "QuantizedExperts",
    "QuantizedFactor",
    "StorageFormat",
    "UnitOrder",
    "WhiteningRoots",
    "align_hidden_units",
    "factorize_cluster",
    "factorize_difference",
    "factorize_expert",
    "fake_quantize",
    "init_base",
    "init_residual",
    "long_axis",
    "relative_error",
    "usage_weighted_mean",
]
