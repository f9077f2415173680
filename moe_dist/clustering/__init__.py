"""Clustering of experts as pure functions: similarity, balanced assignment, matching. No communication."""

from moe_dist.clustering.activation import ActivationStatistics
from moe_dist.clustering.assignment import Assignment, assign_balanced
from moe_dist.clustering.factors import FactoredProjection, gated_projections
from moe_dist.clustering.gram import parameter_similarity
from moe_dist.clustering.matching import Match, match_clusters
from moe_dist.clustering.quality import ClusterQuality, adjusted_rand_index, cluster_quality
from moe_dist.clustering.similarity import FusedSimilarity, centroid_similarity, fuse, router_similarity
from moe_dist.clustering.sketch import sketch_weights, sketched_parameter_similarity

__all__ = [
    "ActivationStatistics",
    "Assignment",
    "ClusterQuality",
    "FactoredProjection",
    "FusedSimilarity",
    "Match",
    "adjusted_rand_index",
    "assign_balanced",
    "centroid_similarity",
    "cluster_quality",
    "fuse",
    "gated_projections",
    "match_clusters",
    "parameter_similarity",
    "router_similarity",
    "sketch_weights",
    "sketched_parameter_similarity",
]
