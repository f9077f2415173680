"""Fused similarity of experts: of their parameters and of their activations.

    S = alpha S_param + (1 - alpha) S_act,    S_act = (1 - rho) S_centroid + rho S_router

All parts are cosines minus the mean over experts. Before they are added each is divided by its spread, the standard
deviation over pairs: that of residuals, which lie in random subspaces, is a hundredth of that of inputs.

Shapes: E experts, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.clustering.activation import ActivationStatistics
from moe_dist.clustering.cosine import cosine_of_vectors


@dataclass(frozen=True)
class FusedSimilarity:
    """S and its parts, float64 [E, E] each; a part without weight may be None."""

    fused_EE: Tensor
    parameter_EE: Tensor | None
    centroid_EE: Tensor | None
    router_EE: Tensor | None

    @property
    def parts(self) -> dict[str, Tensor]:
        """Parts that are present, by name."""
        named = {"parameter": self.parameter_EE, "centroid": self.centroid_EE, "router": self.router_EE}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Names of parts that hold NaN or infinity; if there are any, no expert should move."""
        return tuple(name for name, part in self.parts.items() if not bool(torch.isfinite(part).all()))

    @property
    def usable(self) -> bool:
        """True if every part is finite."""
        return not self.not_finite


def centroid_similarity(statistics: ActivationStatistics) -> Tensor:
    """Compute S_centroid: cosines of the experts' token centroids; the similarity of an unused expert is 0."""
    return cosine_of_vectors(statistics.centroids(), statistics.seen)


def router_similarity(weight_ED: Tensor) -> Tensor:
    """Compute S_router: cosines of the experts' router embeddings."""
    return cosine_of_vectors(weight_ED)


def spread(part_EE: Tensor) -> Tensor:
    """Compute the standard deviation of a part over the pairs of different experts; 1 if all are equal."""
    off_diagonal = part_EE[~torch.eye(len(part_EE), dtype=torch.bool, device=part_EE.device)]
    deviation = off_diagonal.double().std(correction=0)
    return torch.where(deviation > 0, deviation, 1.0) if bool(deviation.isfinite()) else torch.ones_like(deviation)


def fuse(
    parameter_EE: Tensor | None,
    centroid_EE: Tensor | None,
    router_EE: Tensor | None = None,
    *,
    alpha: float,
    router_weight: float = 0.0,
) -> FusedSimilarity:
    """Combine the parts by their weights, in units of their spreads.

    Args:
        parameter_EE: S_param, needed if alpha > 0.
        centroid_EE: S_centroid, needed if (1 - alpha) (1 - router_weight) > 0.
        router_EE: S_router, needed if (1 - alpha) router_weight > 0.
        alpha: weight of the parameters, in [0, 1].
        router_weight: rho, weight of the router's embeddings within S_act, in [0, 1].

    Raises:
        ValueError: a weight outside [0, 1], or a part with weight that is missing.
    """
    for name, value in (("alpha", alpha), ("router_weight", router_weight)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in [0, 1]")
    weights = (alpha, (1 - alpha) * (1 - router_weight), (1 - alpha) * router_weight)
    terms = []
    for name, weight, part in zip(
        ("parameter", "centroid", "router"), weights, (parameter_EE, centroid_EE, router_EE), strict=True
    ):
        if weight > 0:
            if part is None:
                raise ValueError(f"similarity of {name} has weight {weight:g} but was not given")
            terms.append(weight * part / spread(part))
    return FusedSimilarity(torch.stack(terms).sum(0), parameter_EE, centroid_EE, router_EE)
