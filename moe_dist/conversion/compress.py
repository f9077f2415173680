"""One layer's standard experts made into clusters: bases where clusters live, residuals where experts live.

The rank that holds a standard expert makes its residual, so that the work is divided as the experts are and no full
expert travels: a cluster's base is a sum over ranks, and what goes to the cluster's ranks is thin.

Shapes: E experts, D hidden, F expert hidden, H = 2 F.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import (
    ExpertMatrices,
    FactorisedExpert,
    InputRoots,
    factorise_expert,
    project_first,
    project_second,
    relative_output_error,
)
from moe_dist.config import MoEConfig
from moe_dist.conversion.delivery import ResidualState, deliver
from moe_dist.conversion.held import HeldExpert, HeldLayer
from moe_dist.engine.training_state import MASTER, MOMENTS
from moe_dist.topology.mesh import Mesh
from moe_dist.topology.placement import ExpertPlacement

EXACT_UP_TO = 512
"""Widths up to which residuals are decomposed exactly; wider ones by the seeded search."""

BaseState = dict[str, ExpertMatrices]
"""By `STATE_NAMES`."""


@dataclass(frozen=True)
class CompressedLayer:
    """This rank's share of a layer's clusters, and how well all experts are approximated."""

    placement: ExpertPlacement
    bases: dict[int, BaseState]
    """By cluster, of those that live here."""
    residuals: dict[int, ResidualState]
    """By expert, of those that live here."""
    output_error_E: Tensor
    """`|y' - y| / |y|` of each expert of the layer on held-back tokens, float64."""
    base_output_error_E: Tensor
    """The same with the base alone."""
    whitened: float
    """Share of the experts' matrices for which whitening lost less."""


@torch.no_grad()
def compress_layer(
    layer: HeldLayer, placement: ExpertPlacement, usage_E: Tensor, moe: MoEConfig, mesh: Mesh, seed: int
) -> CompressedLayer:
    """Bases and residuals of a layer, each on its rank; collective.

    Args:
        usage_E: weight of every expert in its cluster's base.
        seed: of the randomised decomposition of wide matrices.
    """
    local = {expert.number: expert for expert in layer.experts}
    bases: dict[int, BaseState] = {}
    made: dict[int, ResidualState] = {}
    figures_E3 = torch.zeros(layer.total, 3, dtype=torch.float64, device=usage_E.device)
    for cluster, members in enumerate(placement.members):
        base = _base([local[e] for e in members if e in local], layer, members, usage_E)
        if placement.block_of_cluster[cluster] == mesh.at.cluster:
            bases[cluster] = base
        for e in (e for e in members if e in local):
            factorised = _factorise(local[e], base[MASTER], moe, seed)
            made[e] = _residual_state(local[e], factorised)
            figures_E3[e] = _figures(local[e], base[MASTER], factorised)
    if layer.group.size > 1:
        dist.all_reduce(figures_E3, group=layer.group.handle)
    residuals = deliver(dict(sorted(made.items())), placement, layer.group, mesh.rank)
    error_E, base_error_E, whitened_E = figures_E3.unbind(1)
    return CompressedLayer(placement, bases, residuals, error_E, base_error_E, float(whitened_E.mean()))


def _base(members: list[HeldExpert], layer: HeldLayer, numbers: tuple[int, ...], usage_E: Tensor) -> BaseState:
    """Mean of the weights by usage, and sums of the moments, over all ranks' members."""
    share_E = _shares(usage_E, numbers)
    like = layer.experts[0].matrices
    found = {}
    for kind in (MASTER, *MOMENTS):
        w_in_DH, w_out_FD = (torch.zeros_like(w, dtype=torch.float64) for w in (like.w_in_DH, like.w_out_FD))
        for expert in members:
            weight = float(share_E[expert.number]) if kind == MASTER else 1.0
            w_in_DH.add_(expert.state[kind].w_in_DH, alpha=weight)
            w_out_FD.add_(expert.state[kind].w_out_FD, alpha=weight)
        for total in (w_in_DH, w_out_FD) if layer.group.size > 1 else ():
            dist.all_reduce(total, group=layer.group.handle)
        found[kind] = ExpertMatrices(w_in_DH.float(), w_out_FD.float())
    return found


def _shares(usage_E: Tensor, members: tuple[int, ...]) -> Tensor:
    """Weights of a cluster's members, of sum 1; equal where none was used."""
    share_E = torch.zeros_like(usage_E)
    share_E[list(members)] = usage_E[list(members)]
    if not share_E.any():
        share_E[list(members)] = 1.0
    return share_E / share_E.sum()


def _factorise(expert: HeldExpert, base: ExpertMatrices, moe: MoEConfig, seed: int) -> FactorisedExpert:
    exact = min(expert.matrices.w_out_FD.shape) <= EXACT_UP_TO
    matrices, base = expert.matrices.double(), base.double()
    fit, check = (
        InputRoots.of_tokens(x_LD, matrices.hidden(x_LD)) for x_LD in (expert.fit_LD.double(), expert.check_LD.double())
    )
    return factorise_expert(
        matrices,
        base,
        moe.rank,
        vectors=moe.expert_vectors,
        inputs=fit,
        check=check,
        seed=None if exact else seed,
    )


def _residual_state(expert: HeldExpert, factorised: FactorisedExpert) -> ResidualState:
    residual = factorised.residual.float()
    first, second = (expert.state[moment] for moment in MOMENTS)
    return {
        MASTER: residual,
        MOMENTS[0]: project_first(first, residual),
        MOMENTS[1]: project_second(second, residual),
    }


def _figures(expert: HeldExpert, base: ExpertMatrices, factorised: FactorisedExpert) -> Tensor:
    """Output error on held-back tokens, with the residual and without; share of whitened matrices."""
    errors = [
        relative_output_error(expert.check_LD, expert.matrices, approximation)
        for approximation in (base.with_residual(factorised.residual.float()), base)
    ]
    return torch.tensor([*errors, sum(factorised.whitened) / len(factorised.whitened)], dtype=torch.float64)
