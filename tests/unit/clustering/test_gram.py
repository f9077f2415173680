"""S_param by trace identities against weights written out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.clustering import FactoredProjection, gated_projections, gram, parameter_similarity
from tests.unit.clustering.examples import cosines, draw_projections, materialised

widths = st.integers(1, 6)


@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(widths, widths), min_size=1, max_size=3),
    bases=st.integers(1, 4),
    experts=st.integers(1, 7),
    rank=st.integers(1, 3),
)
def test_gram_is_that_of_materialised_weights(
    seed: int, shapes: list[tuple[int, int]], bases: int, experts: int, rank: int
) -> None:
    projections = draw_projections(seed, shapes, bases, experts, rank)
    mean_S = torch.cat([p.bases_CIO.mean(0).flatten() for p in projections])
    weights_ES = materialised(projections) - mean_S
    expected_EE = weights_ES @ weights_ES.T
    found_EE = gram.effective_gram(projections)
    assert (found_EE - expected_EE).abs().max() <= 1e-10 * expected_EE.abs().max()


@given(seed=st.integers(0, 2**31), experts=st.integers(3, 9), rank=st.integers(1, 3))
def test_similarity_is_the_cosine_of_centred_weights(seed: int, experts: int, rank: int) -> None:
    projections = draw_projections(seed, [(5, 7), (7, 5)], 3, experts, rank)
    found_EE = parameter_similarity(projections)
    assert (found_EE - cosines(materialised(projections))).abs().max() <= 1e-10
    assert torch.equal(found_EE, found_EE.T)
    assert torch.equal(found_EE.diagonal(), torch.ones(experts, dtype=torch.float64))


@given(seed=st.integers(0, 2**31), order=st.permutations(range(6)))
def test_experts_may_come_in_any_order(seed: int, order: list[int]) -> None:
    projections = draw_projections(seed, [(4, 6)], 2, 6, 2)
    reordered = [
        replace(p, base_of_E=p.base_of_E[order], u_EIR=p.u_EIR[order], v_ERO=p.v_ERO[order]) for p in projections
    ]
    expected_EE = parameter_similarity(projections)[order][:, order]
    assert (parameter_similarity(reordered) - expected_EE).abs().max() <= 1e-10


def test_blocks_of_experts_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    projections = draw_projections(0, [(6, 5)], 2, 7, 2)
    whole_EE = gram.effective_gram(projections)
    monkeypatch.setattr(gram, "BLOCK", 3)
    assert torch.allclose(gram.effective_gram(projections), whole_EE, rtol=1e-12)


def test_small_differences_of_large_bases_are_not_lost() -> None:
    """Bases that share a start of size 10^6 while experts differ by 1: the Gram of whole weights has no digits left."""
    projections = draw_projections(1, [(8, 8)], 3, 6, 2)
    expected_EE = parameter_similarity(projections)
    start_IO = 1e6 * torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shifted = [replace(p, bases_CIO=p.bases_CIO + start_IO) for p in projections]
    assert (parameter_similarity(shifted) - expected_EE).abs().max() <= 1e-7


def test_gated_projections_are_the_parts_of_an_experts_weights() -> None:
    """`W_in = B_in + [U_gate V_gate | U_up V_up]`, `W_out = B_out + U V`, as the experts are computed."""
    g = torch.Generator().manual_seed(0)
    experts, hidden, ffn, rank = 5, 4, 6, 2
    base_in, base_out = torch.randn(2, hidden, 2 * ffn, generator=g), torch.randn(2, ffn, hidden, generator=g)
    base_of = torch.tensor([0, 0, 1, 1, 0])
    in_u, in_v = torch.randn(experts, hidden, 2 * rank, generator=g), torch.randn(experts, 2, rank, ffn, generator=g)
    out_u, out_v = torch.randn(experts, ffn, rank, generator=g), torch.randn(experts, rank, hidden, generator=g)
    gate, up = in_u[..., :rank] @ in_v[:, 0], in_u[..., rank:] @ in_v[:, 1]
    w_in, w_out = base_in[base_of] + torch.cat([gate, up], dim=2), base_out[base_of] + out_u @ out_v
    expected_EE = cosines(torch.cat([w_in.flatten(1), w_out.flatten(1)], dim=1).double())
    projections = gated_projections(base_in, base_out, base_of, in_u, in_v, out_u, out_v)
    assert (parameter_similarity(projections) - expected_EE).abs().max() <= 1e-5  # the weights are float32


def test_equal_experts_resemble_nobody() -> None:
    (p,) = draw_projections(0, [(4, 5)], 1, 1, 2)
    same = FactoredProjection(
        p.bases_CIO, torch.zeros(4, dtype=torch.int64), *(t.repeat(4, 1, 1) for t in (p.u_EIR, p.v_ERO))
    )
    assert torch.equal(parameter_similarity([same]), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    projections = draw_projections(0, [(4, 5), (5, 4)], 2, 4, 2)
    projections[1].v_ERO[2, 0, 0] = value
    assert not torch.isfinite(parameter_similarity(projections)).all()


def test_tensors_that_do_not_fit_are_refused() -> None:
    (p,) = draw_projections(0, [(4, 5)], 2, 3, 2)
    with pytest.raises(ValueError, match=r"\[C, I, O\]"):
        replace(p, v_ERO=p.v_ERO[:2])
    with pytest.raises(ValueError, match="in 0 to 1, got"):
        replace(p, base_of_E=torch.tensor([0, 1, 2]))
