"""Compression of one layer's experts into clusters: shared bases and low-rank residuals.

The rank that holds a full expert computes its residual, so that the work is divided as the experts are and no full
expert is sent: a cluster's base is an all-reduce, and only low-rank factors go to the cluster's ranks.

Shapes: E experts, D hidden, F expert hidden, H = 2 F.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import (
    ExpertMatrices,
    ExpertResidual,
    FactorizedExpert,
    WhiteningRoots,
    factorize_expert,
)
from moe_dist.config import MoEConfig
from moe_dist.conversion.full_experts import VECTORS, FullExpert, FullExpertLayer
from moe_dist.conversion.residual_exchange import ResidualState, bytes_moved, exchange_residuals, owner_ranks
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.optimizer_state import MASTER

EXACT_UP_TO = 512
"""Width up to which residuals are decomposed exactly; wider ones use the randomized decomposition."""


@dataclass(frozen=True)
class CompressedLayer:
    """This rank's share of the new clusters, and the approximation error of all their experts."""

    placement: ExpertPlacement
    bases: dict[int, ExpertMatrices]
    """Bases by cluster, for the clusters of this rank."""
    residuals: dict[int, ResidualState]
    """Residuals by expert, for the experts of this rank."""
    output_error_E: Tensor
    """Relative error `|y' - y| / |y|` of each expert on held-out tokens, float64; 0 if not compressed."""
    base_output_error_E: Tensor
    """Relative error with the base alone."""
    whitened: float
    """Share of the matrices for which whitening had the smaller error."""
    bytes: int
    """Bytes sent between the ranks of the group: residuals, and all-reduces of bases."""


@torch.no_grad()
def compress_layer(
    layer: FullExpertLayer,
    placement: ExpertPlacement,
    usage_E: Tensor,
    moe: MoEConfig,
    mesh: Mesh,
    seed: int,
    clusters: Collection[int] | None = None,
) -> CompressedLayer:
    """Compute bases and residuals of a layer, each on its rank; collective.

    Args:
        usage_E: weight of every expert in its cluster's base.
        seed: seed of the randomized decomposition of wide matrices.
        clusters: clusters to compress; None: all.
    """
    local = {expert.number: expert for expert in layer.experts}
    chosen = [c for c in range(placement.clusters) if clusters is None or c in clusters]
    bases: dict[int, ExpertMatrices] = {}
    made: dict[int, ResidualState] = {}
    figures_E3 = torch.zeros(placement.experts, 3, dtype=torch.float64, device=usage_E.device)
    for cluster in chosen:
        members = placement.members[cluster]
        base = _base(layer, members, usage_E)
        if placement.block_of_cluster[cluster] == mesh.at.cluster:
            bases[cluster] = base
        for expert in (local[e] for e in members if e in local):
            factorized = _factorize(expert, base, moe, seed)
            made[expert.number] = _residual_state(expert, factorized, layer.kinds)
            figures_E3[expert.number] = _figures(expert, base, factorized)
    if layer.group.size > 1:
        dist.all_reduce(figures_E3, group=layer.group.handle)
    source_of = {e: layer.holder_of[e] for c in chosen for e in placement.members[c]}
    like = _template(layer, moe)
    residuals = exchange_residuals(made, like, source_of, owner_ranks(placement), layer.group, mesh.rank)
    error_E, base_error_E, whitened_E = figures_E3.unbind(1)
    return CompressedLayer(
        placement,
        bases,
        residuals,
        error_E,
        base_error_E,
        whitened=float(whitened_E.sum()) / len(source_of),
        bytes=bytes_moved(like, source_of, owner_ranks(placement)) + len(chosen) * _sum_bytes(layer),
    )


def _base(layer: FullExpertLayer, members: tuple[int, ...], usage_E: Tensor) -> ExpertMatrices:
    """Compute the usage-weighted mean of the weights over all ranks' members."""
    share_E, like = _shares(usage_E, members), layer.experts[0].matrices
    w_in_DH, w_out_FD = (torch.zeros_like(w, dtype=torch.float64) for w in (like.w_in_DH, like.w_out_FD))
    for expert in (one for one in layer.experts if one.number in members):
        w_in_DH.add_(expert.matrices.w_in_DH, alpha=float(share_E[expert.number]))
        w_out_FD.add_(expert.matrices.w_out_FD, alpha=float(share_E[expert.number]))
    for total in (w_in_DH, w_out_FD) if layer.group.size > 1 else ():
        dist.all_reduce(total, group=layer.group.handle)
    return ExpertMatrices(w_in_DH.float(), w_out_FD.float())


def _sum_bytes(layer: FullExpertLayer) -> int:
    """Return the bytes of one cluster's base in the float64 all-reduce."""
    one, ranks = layer.experts[0], layer.group.size
    entries = one.matrices.w_in_DH.numel() + one.matrices.w_out_FD.numel()
    return entries * 8 * ranks * (ranks - 1)


def _shares(usage_E: Tensor, members: tuple[int, ...]) -> Tensor:
    """Return the weights of a cluster's members, of sum 1; equal if none was used."""
    share_E = torch.zeros_like(usage_E)
    share_E[list(members)] = usage_E[list(members)]
    if not share_E.any():
        share_E[list(members)] = 1.0
    return share_E / share_E.sum()


def _factorize(expert: FullExpert, base: ExpertMatrices, moe: MoEConfig, seed: int) -> FactorizedExpert:
    exact = min(expert.matrices.w_out_FD.shape) <= EXACT_UP_TO
    matrices = expert.matrices.double()
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


def _residual_state(expert: FullExpert, factorized: FactorizedExpert, kinds: tuple[str, ...]) -> ResidualState:
    """Return the factors, with moments of zero if moments are needed, and the vectors unchanged."""
    residual = factorized.residual.float()
    states = {kind: residual if kind == MASTER else residual.zeros() for kind in kinds}
    return {kind: replace(state, **expert.vectors.get(kind, {})) for kind, state in states.items()}


def _template(layer: FullExpertLayer, moe: MoEConfig) -> ResidualState:
    """Return a zero state with the shapes of every expert's residual, for receive buffers."""
    like = layer.experts[0].matrices.w_out_FD
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


def _figures(expert: FullExpert, base: ExpertMatrices, factorized: FactorizedExpert) -> Tensor:
    """Return the output error on held-out tokens, with the residual and without, and the share of whitened matrices."""
    residual = factorized.residual.float()
    errors = [expert.output_error(approximation) for approximation in (base.with_residual(residual), base)]
    return torch.tensor([*errors, sum(factorized.whitened) / len(factorized.whitened)], dtype=torch.float64)
