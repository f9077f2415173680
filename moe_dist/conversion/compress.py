"""Compression of one layer's experts into clusters: shared bases and low-rank residuals.

The rank that holds a full expert computes its residual, so that the work is divided as the experts are and no full
expert is sent: a cluster's base is an all-reduce, and only low-rank factors go to the cluster's ranks. Clusters are
compressed one after another, and experts are loaded one at a time: a rank holds one full expert, its float64 copies
and the base of one cluster, whatever the number of experts.

With two-level bases the first level stays, and the cluster's factors are those nearest to the rest of the mean.

Shapes: E experts, M experts of a cluster, D hidden, F expert hidden, H = 2 F.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import (
    ExpertMatrices,
    ExpertResidual,
    FactorizedExpert,
    WhiteningRoots,
    factorize_difference,
    factorize_expert,
)
from moe_dist.config import MoEConfig
from moe_dist.conversion.full_experts import VECTORS, FullExpert, FullExpertLayer
from moe_dist.conversion.residual_exchange import ResidualState, bytes_moved, exchange_residuals, owner_ranks
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.gathered_optimizer_state import GatheredOptimizerState
from moe_dist.engine.optimizer_state import MASTER

EXACT_UP_TO = 512
"""Width up to which residuals are decomposed exactly; wider ones use the randomized decomposition."""


@dataclass(frozen=True)
class CompressedCluster:
    """This rank's share of one new cluster, and the approximation errors of all its experts."""

    number: int
    base: dict[str, GatheredOptimizerState]
    """States of the base's parameters by name; those without moments keep the present ones. Empty on other ranks."""
    residuals: dict[int, ResidualState]
    """Residuals by expert, for the experts of this rank."""
    figures_M3: Tensor
    """Figures of each expert: relative output error `|y' - y| / |y|` on held-out tokens, the same with the base alone,
    and the share of its matrices for which whitening had the smaller error; float64."""
    bytes: int
    """Bytes sent between the ranks of the group: residuals, and the all-reduce of the base."""


@dataclass(frozen=True)
class CompressedLayer:
    """This rank's share of a layer's new clusters, and the approximation error of all experts."""

    placement: ExpertPlacement
    clusters: list[CompressedCluster]
    shared: ExpertMatrices | None = None
    """First level of two-level bases, the same on all ranks."""

    @cached_property
    def figures(self) -> Tensor:
        """Figures of all experts, [E, 3] (`figures_M3`); zeros for those that are not compressed."""
        figures_E3 = torch.zeros(self.placement.experts, 3, dtype=torch.float64)
        for cluster in self.clusters:
            figures_E3[list(self.placement.members[cluster.number])] = cluster.figures_M3.cpu()
        return figures_E3

    @property
    def bytes(self) -> int:
        """Bytes sent between the ranks of the group."""
        return sum(cluster.bytes for cluster in self.clusters)


@torch.no_grad()
def compress_clusters(
    layer: FullExpertLayer,
    placement: ExpertPlacement,
    usage_E: Tensor,
    moe: MoEConfig,
    mesh: Mesh,
    seed: int,
    clusters: Collection[int],
) -> Iterator[CompressedCluster]:
    """Compute bases and residuals of some clusters, each on its rank, and yield cluster by cluster; collective.

    Args:
        usage_E: weight of every expert in its cluster's base.
        seed: seed of the randomized decomposition of wide matrices.
    """
    local = {expert.number: expert for expert in layer.experts}
    like, owner_of = _template(layer, moe), owner_ranks(placement)
    for cluster in clusters:
        members = placement.members[cluster]
        base, parameters = _base(layer, members, usage_E, moe, seed)
        made: dict[int, ResidualState] = {}
        figures_M3 = torch.zeros(len(members), 3, dtype=torch.float64, device=usage_E.device)
        for row, expert in enumerate(members):
            if expert in local:
                made[expert], figures_M3[row] = _compress(local[expert], base, moe, seed, layer.kinds)
        if layer.group.size > 1:
            dist.all_reduce(figures_M3, group=layer.group.handle)
        source_of = {expert: layer.holder_of[expert] for expert in members}
        residuals = exchange_residuals(made, like, source_of, owner_of, layer.group, mesh.rank)
        sent = bytes_moved(like, source_of, owner_of) + _sum_bytes(layer)
        here = placement.block_of_cluster[cluster] == mesh.at.cluster
        yield CompressedCluster(cluster, parameters if here else {}, residuals, figures_M3, sent)


def _base(
    layer: FullExpertLayer, members: tuple[int, ...], usage_E: Tensor, moe: MoEConfig, seed: int
) -> tuple[ExpertMatrices, dict[str, GatheredOptimizerState]]:
    """Return a cluster's new base, and the states of its parameters."""
    mean, shared = mean_weights(layer, members, usage_E), layer.shared
    if shared is None:
        mean = mean.float()
        return mean, {"w_in_DH": {MASTER: mean.w_in_DH}, "w_out_FD": {MASTER: mean.w_out_FD}}
    drawn = None if min(mean.w_out_FD.shape) <= EXACT_UP_TO else seed
    factors = [
        factor.float()
        for whole, part in ((mean.w_in_DH, shared.w_in_DH), (mean.w_out_FD, shared.w_out_FD))
        for factor in factorize_difference(whole - part, moe.base_rank, drawn)
    ]
    states = [
        {kind: factor if kind == MASTER else torch.zeros_like(factor) for kind in layer.kinds} for factor in factors
    ]
    return shared.with_factors(*factors), dict(zip(("in_p_DR", "in_q_RH", "out_p_FR", "out_q_RD"), states, strict=True))


def mean_weights(layer: FullExpertLayer, members: Collection[int], usage_E: Tensor) -> ExpertMatrices:
    """Compute the usage-weighted mean of some experts' weights over all ranks, float64; collective."""
    share_E = _shares(usage_E, members)
    total = layer.zeros.double()
    for expert in (one for one in layer.experts if one.number in members):
        matrices = expert.load()
        total.w_in_DH.add_(matrices.w_in_DH, alpha=float(share_E[expert.number]))
        total.w_out_FD.add_(matrices.w_out_FD, alpha=float(share_E[expert.number]))
    for part in (total.w_in_DH, total.w_out_FD) if layer.group.size > 1 else ():
        dist.all_reduce(part, group=layer.group.handle)
    return total


def _sum_bytes(layer: FullExpertLayer) -> int:
    """Return the bytes of one cluster's base in the float64 all-reduce."""
    ranks = layer.group.size
    return (layer.zeros.w_in_DH.numel() + layer.zeros.w_out_FD.numel()) * 8 * ranks * (ranks - 1)


def _shares(usage_E: Tensor, members: Collection[int]) -> Tensor:
    """Return the weights of a cluster's members, of sum 1; equal if none was used."""
    share_E = torch.zeros_like(usage_E)
    share_E[list(members)] = usage_E[list(members)]
    if not share_E.any():
        share_E[list(members)] = 1.0
    return share_E / share_E.sum()


def _compress(
    expert: FullExpert, base: ExpertMatrices, moe: MoEConfig, seed: int, kinds: tuple[str, ...]
) -> tuple[ResidualState, Tensor]:
    """Return an expert's residual and its figures."""
    matrices = expert.load()
    factorized = _factorize(expert, matrices.double(), base, moe, seed)
    residual = factorized.residual.float()
    errors = [expert.output_error(approximation, matrices) for approximation in (base.with_residual(residual), base)]
    figures = torch.tensor([*errors, sum(factorized.whitened) / len(factorized.whitened)], dtype=torch.float64)
    return _residual_state(expert, residual, kinds), figures


def _factorize(
    expert: FullExpert, matrices: ExpertMatrices, base: ExpertMatrices, moe: MoEConfig, seed: int
) -> FactorizedExpert:
    exact = min(matrices.w_out_FD.shape) <= EXACT_UP_TO
    fit, check = (
        WhiteningRoots.of_tokens(x_LD, expert.hidden(x_LD, matrices))
        for x_LD in (expert.fit_LD.double(), expert.check_LD.double())
    )
    return factorize_expert(
        matrices,
        base.double(),
        moe.rank,
        vectors=moe.expert_vectors,
        inputs=fit,
        check=check,
        seed=None if exact else seed,
    )


def _residual_state(expert: FullExpert, residual: ExpertResidual, kinds: tuple[str, ...]) -> ResidualState:
    """Return the factors, with moments of zero if moments are needed, and the vectors unchanged."""
    states = {kind: residual if kind == MASTER else residual.zeros() for kind in kinds}
    return {kind: replace(state, **expert.vectors.get(kind, {})) for kind, state in states.items()}


def _template(layer: FullExpertLayer, moe: MoEConfig) -> ResidualState:
    """Return a zero state with the shapes of every expert's residual, for receive buffers."""
    like = layer.zeros.w_out_FD
    (width, hidden), zeros = like.shape, like.new_zeros
    vectors = dict(zip(VECTORS, (zeros(width), zeros(2 * width), zeros(hidden)), strict=True))
    residual = ExpertResidual(
        zeros(hidden, 2 * moe.rank),
        zeros(2, moe.rank, width),
        zeros(width, moe.rank),
        zeros(moe.rank, hidden),
        **(vectors if moe.expert_vectors else dict.fromkeys(VECTORS)),
    )
    return dict.fromkeys(layer.kinds, residual)
