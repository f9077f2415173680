"""The fused similarity and its parts."""

from statistics import pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.clustering import (
    ActivationStatistics,
    FactoredProjection,
    adjusted_rand_index,
    assign_balanced,
    centroid_similarity,
    fuse,
    parameter_similarity,
    router_similarity,
    sketch_weights,
    sketched_parameter_similarity,
)
from moe_dist.clustering.similarity import spread
from tests.unit.clustering.examples import cosines, planted_groups, planted_vectors

A, B, C = (torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3))
fractions = st.floats(0, 1)


def off_diagonal_deviation(part_EE: torch.Tensor) -> float:
    """By hand, over the twelve ordered pairs of four experts."""
    pairs = [part_EE[i, j].item() for i in range(4) for j in range(4) if i != j]
    return pstdev(pairs)


def observed(centroid_ED: torch.Tensor) -> ActivationStatistics:
    """Every expert given one token: its centroid."""
    statistics = ActivationStatistics.empty(len(centroid_ED), centroid_ED.shape[1], decay=0.9)
    statistics.begin_step()
    statistics.update(centroid_ED, torch.arange(len(centroid_ED))[:, None], torch.ones(len(centroid_ED), 1))
    return statistics


@given(alpha=fractions, rho=fractions)
def test_parts_are_weighed_together(alpha: float, rho: float) -> None:
    found = fuse(A, B, C, alpha=alpha, router_weight=rho)
    a, b, c = (part / off_diagonal_deviation(part) for part in (A, B, C))
    assert torch.allclose(found.fused_EE, alpha * a + (1 - alpha) * ((1 - rho) * b + rho * c), atol=1e-12)
    scaled = fuse(A / 100, B, C, alpha=alpha, router_weight=rho)
    assert torch.allclose(scaled.fused_EE, found.fused_EE, atol=1e-12), "how large a part is does not count"
    assert found.usable
    assert list(found.parts) == ["parameter", "centroid", "router"]


def test_a_part_without_weight_may_be_left_out() -> None:
    assert torch.equal(fuse(A, None, alpha=1.0).fused_EE, A / spread(A))
    assert torch.equal(fuse(None, B, alpha=0.0).fused_EE, B / spread(B))
    assert torch.equal(fuse(None, None, C, alpha=0.0, router_weight=1.0).fused_EE, C / spread(C))
    equal = torch.full((3, 3), 0.5, dtype=torch.float64)
    assert torch.equal(fuse(equal, None, alpha=1.0).fused_EE, equal), "nothing to scale"
    with pytest.raises(ValueError, match=r"centroid has weight 0\.5"):
        fuse(A, None, alpha=0.5)
    with pytest.raises(ValueError, match=r"router has weight 0\.25"):
        fuse(A, B, alpha=0.5, router_weight=0.5)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_weights_outside_0_to_1_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        fuse(A, B, alpha=value)
    with pytest.raises(ValueError, match="router_weight"):
        fuse(A, B, C, alpha=0.5, router_weight=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_part_that_is_not_finite_is_named_even_without_weight(value: float) -> None:
    centroid_ED = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    centroid_ED[1, 2] = value
    bad_EE = centroid_similarity(observed(centroid_ED))
    for alpha in (0.5, 1.0):
        found = fuse(A, bad_EE, alpha=alpha)
        assert found.not_finite == ("centroid",)
        assert not found.usable


def test_nan_in_a_routers_weight_is_not_taken_for_an_idle_expert() -> None:
    statistics = observed(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    statistics.update(torch.ones(1, 3), torch.tensor([[2]]), torch.tensor([[float("nan")]]))
    assert statistics.seen.all()
    assert fuse(None, centroid_similarity(statistics), alpha=0.0).not_finite == ("centroid",)


def test_centroids_and_router_rows_are_compared_less_their_mean() -> None:
    x_ED = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 10
    for found_EE in (centroid_similarity(observed(x_ED)), router_similarity(x_ED)):
        assert (found_EE - cosines(x_ED.double())).abs().max() <= 1e-5
        assert torch.equal(found_EE, found_EE.T)


def test_idle_experts_resemble_nobody_and_do_not_shift_the_mean() -> None:
    x_ED = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) + 10
    busy = observed(x_ED)
    idle = ActivationStatistics(
        torch.cat([busy.weighted_ED, torch.zeros(1, 5)]), torch.cat([busy.mass_E, torch.zeros(1)]), busy.steps, 0.9
    )
    found_EE = centroid_similarity(idle)
    assert torch.allclose(found_EE[:4, :4], centroid_similarity(busy), atol=1e-12)
    assert torch.equal(found_EE[4], torch.tensor([0.0, 0, 0, 0, 1], dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sketched", [False, True])
def test_groups_planted_in_weights_and_centroids_are_found(alpha: float, sketched: bool) -> None:
    """32 experts spread at random over 4 bases, V and centroids planted in 4 groups with noise as large as they."""
    truth_E = planted_groups(0, 32, 4)
    g = torch.Generator().manual_seed(0)
    v_ERO = torch.from_numpy(planted_vectors(1, truth_E, 2 * 96, 1.0)).view(32, 2, 96)
    u_EIR = torch.randn(80, 2, dtype=torch.float64, generator=g).expand(32, 80, 2)
    base_of_E = torch.from_numpy(planted_groups(5, 32, 4))
    bases_CIO = 0.5 * torch.randn(4, 80, 96, dtype=torch.float64, generator=g)
    projections = [FactoredProjection(bases_CIO, base_of_E, u_EIR, v_ERO)]
    exact_EE = parameter_similarity(projections)
    parameter_EE = sketched_parameter_similarity(sketch_weights(projections, 3)) if sketched else exact_EE
    centroid_EE = centroid_similarity(observed(torch.from_numpy(planted_vectors(2, truth_E, 48, 1.0)).float() + 3))
    similarity = fuse(parameter_EE, centroid_EE, alpha=alpha)
    assert similarity.usable
    found = assign_balanced(similarity.fused_EE.numpy(), 4, seed=0)
    assert adjusted_rand_index(truth_E, found.labels) > 0.95
