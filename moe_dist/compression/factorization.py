"""Factorization of full experts into a shared base, their usage-weighted mean, and a low-rank residual each.

The difference `D = W - B` is approximated by `U V = D Q Q^T`, where Q spans the leading right singular vectors

    of D itself (plain): nearest to W in all its entries; or
    of C^1/2 D (whitened), C the second moments of the matrix's inputs: nearest to W in its outputs,

since `E |x (D - U V)|^2 = |C^1/2 (D - U V)|^2`. No inverse of C^1/2 is needed, so C may be singular. Moments of few
tokens are noisy, so each matrix uses the variant with the smaller error on moments of other tokens.

Shapes: N experts, D model width, F hidden width, H = 2 F (gate | up), R rank; I rows of a projection, O its columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.compression.expert_matrices import ExpertMatrices
from moe_dist.compression.initialization import V_STD, ExpertResidual
from moe_dist.compression.low_rank import leading_right_vectors
from moe_dist.compression.whitening import Root, WhiteningRoots, apply_root


@dataclass(frozen=True)
class FactorizedExpert:
    """Residual of an expert and its approximation errors, one for each of gate, up and output.

    Errors are relative, `|C^1/2 (W - B - U V)| / |C^1/2 W|`, with the moments that decided (none: C = 1).
    """

    residual: ExpertResidual
    errors: tuple[float, float, float]
    base_errors: tuple[float, float, float]
    """Errors with the base alone."""
    whitened: tuple[bool, bool, bool]


def usage_weighted_mean(w_NIO: Tensor, usage_N: Tensor) -> Tensor:
    """Compute `sum_n usage_n W_n / sum_n usage_n`, with usage >= 0; the plain mean if nothing was used."""
    weight_N = usage_N.to(w_NIO)
    if not weight_N.any():
        weight_N = torch.ones_like(weight_N)
    mean_IO: Tensor = torch.tensordot(weight_N / weight_N.sum(), w_NIO, dims=1)
    return mean_IO


def factorize_expert(
    expert: ExpertMatrices,
    base: ExpertMatrices,
    rank: int,
    *,
    vectors: bool = False,
    inputs: WhiteningRoots | None = None,
    check: WhiteningRoots | None = None,
    seed: int | None = None,
) -> FactorizedExpert:
    """Compute the residual of rank `rank` that brings the base nearest to the expert.

    Args:
        vectors: add the expert's vectors, zero.
        inputs: moments that whitening fits; None: plain only.
        check: moments of other tokens, which decide between plain and whitened; None: `inputs`.
        seed: seed of the randomized decomposition, the same on all ranks; None: the exact one.

    Raises:
        ValueError: the rank is larger than a matrix allows.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be >= 1")
    nothing = WhiteningRoots(None, None)
    fit = (inputs or nothing).projections()
    judge = (check or inputs or nothing).projections()
    parts = zip(expert.projections(), base.projections(), fit, judge, strict=True)
    gate, up, out = (_factorize(w_IO, base_IO, rank, fits, judges, seed) for w_IO, base_IO, fits, judges in parts)
    hidden, width = expert.w_out_FD.shape[1], expert.w_out_FD.shape[0]
    zeros = expert.w_out_FD.new_zeros
    residual = ExpertResidual(
        in_u_DR=torch.cat([gate.u_IR, up.u_IR], dim=1),
        in_v_RH=torch.stack([gate.v_RO, up.v_RO]),
        out_u_FR=out.u_IR,
        out_v_RD=out.v_RO,
        hidden_gate_F=zeros(width) if vectors else None,
        hidden_bias_H=zeros(2 * width) if vectors else None,
        output_bias_D=zeros(hidden) if vectors else None,
    )
    return FactorizedExpert(
        residual,
        errors=(gate.error, up.error, out.error),
        base_errors=(gate.base_error, up.base_error, out.base_error),
        whitened=(gate.whitened, up.whitened, out.whitened),
    )


@dataclass(frozen=True)
class FactorizedCluster:
    """Cluster of factorized experts, and their approximation errors."""

    weights: ClusterWeights
    experts: tuple[FactorizedExpert, ...]


def factorize_cluster(
    w_in_NDH: Tensor,
    w_out_NFD: Tensor,
    usage_N: Tensor,
    rank: int,
    *,
    vectors: bool = False,
    inputs: Sequence[WhiteningRoots] | None = None,
    check: Sequence[WhiteningRoots] | None = None,
    seed: int | None = None,
) -> FactorizedCluster:
    """Factorize all members of a cluster: the usage-weighted mean as base, and a residual each (`factorize_expert`).

    Args:
        w_in_NDH: gate | up of each member, [N, D, 2F].
        w_out_NFD: output projections, [N, F, D].
        usage_N: weight of each member in the base.
    """
    base = ExpertMatrices(usage_weighted_mean(w_in_NDH, usage_N), usage_weighted_mean(w_out_NFD, usage_N))
    factorized = tuple(
        factorize_expert(
            ExpertMatrices(w_in_NDH[e], w_out_NFD[e]),
            base,
            rank,
            vectors=vectors,
            inputs=None if inputs is None else inputs[e],
            check=None if check is None else check[e],
            seed=seed,
        )
        for e in range(len(w_in_NDH))
    )
    residuals = [vars(one.residual) for one in factorized]
    columns: list[Any] = [[residual[name] for residual in residuals] for name in residuals[0]]
    stacked: list[Any] = [None if column[0] is None else torch.stack(column) for column in columns]  # in order
    return FactorizedCluster(ClusterWeights(base.w_in_DH, base.w_out_FD, *stacked), factorized)


def factorize_difference(left_IO: Tensor, rank: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Return balanced factors [I, R] and [R, O] whose product is nearest to a matrix in all its entries."""
    q_OR = leading_right_vectors(left_IO, rank, seed)
    return _balanced(left_IO @ q_OR, q_OR.T)


@dataclass(frozen=True)
class _Factors:
    u_IR: Tensor
    v_RO: Tensor
    error: float
    base_error: float
    whitened: bool


def _factorize(w_IO: Tensor, base_IO: Tensor, rank: int, fit: Root, judge: Root, seed: int | None) -> _Factors:
    """Factorize one matrix; `fit` and `judge` weight its rows."""
    left_IO = w_IO - base_IO
    whole = _norm(judge, w_IO)

    def kept(q_OR: Tensor) -> float:
        return _ratio(_norm(judge, left_IO - left_IO @ q_OR @ q_OR.T), whole)

    q_OR = leading_right_vectors(left_IO, rank, seed)
    error, whitened = kept(q_OR), False
    if fit is not None:
        fitted_OR = _whitened_vectors(fit, left_IO, rank, seed)
        fitted_error = kept(fitted_OR)
        if fitted_error < error:
            q_OR, error, whitened = fitted_OR, fitted_error, True
    u_IR, v_RO = _balanced(left_IO @ q_OR, q_OR.T)
    return _Factors(u_IR, v_RO, error, _ratio(_norm(judge, left_IO), whole), whitened)


def _whitened_vectors(fit: Tensor, left_IO: Tensor, rank: int, seed: int | None) -> Tensor:
    """Return the leading right singular vectors of the outputs, completed by the matrix's own for few tokens."""
    output_IO = apply_root(fit, left_IO)
    fitted = min(rank, len(output_IO))
    q_OR = leading_right_vectors(output_IO, fitted, seed)
    rest_OR = leading_right_vectors(left_IO - left_IO @ q_OR @ q_OR.T, rank - fitted, seed)
    return torch.cat([q_OR, rest_OR], dim=1)


def _balanced(u_IR: Tensor, v_RO: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale U and V to equal norms without changing their product, so that an optimizer treats both alike.

    V's norm is at least that of a new expert: where U and V both vanish, neither would get a gradient.
    """
    size_R = torch.linalg.vector_norm(u_IR, dim=0)
    scale_R = size_R.sqrt().clamp(min=V_STD * v_RO.shape[1] ** 0.5)
    return u_IR / scale_R, v_RO * scale_R[:, None]


def _norm(root: Root, w_IO: Tensor) -> float:
    return float(torch.linalg.vector_norm(apply_root(root, w_IO)))


def _ratio(part: float, whole: float) -> float:
    """Return part / whole, and 0 for 0 / 0."""
    return part / whole if whole > 0 else float(part > 0)
