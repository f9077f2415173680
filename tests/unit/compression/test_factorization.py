"""Full experts as base and residuals: exact where they are, never worse than the mean, fast path against reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.compression import (
    ExpertMatrices,
    UnitOrder,
    WhiteningRoots,
    align_hidden_units,
    factorize_cluster,
    factorize_expert,
    relative_error,
    usage_weighted_mean,
)
from moe_dist.compression.low_rank import leading_right_vectors
from moe_dist.compression.whitening import apply_root
from moe_dist.kernels.reference import expert as run_expert
from moe_dist.kernels.reference import expert_weights

HIDDEN, WIDTH = 12, 20
seeds = st.integers(0, 2**31)
ranks = st.integers(1, 4)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_experts(seed: int, experts: int) -> tuple[Tensor, Tensor]:
    return draw(seed, experts, HIDDEN, 2 * WIDTH), draw(seed + 1, experts, WIDTH, HIDDEN)


def draw_inputs(seed: int, experts: int, tokens: int) -> list[WhiteningRoots]:
    x_NTD, hidden_NTF = draw(seed + 2, experts, tokens, HIDDEN), draw(seed + 3, experts, tokens, WIDTH)
    return [WhiteningRoots.of_tokens(x, h) for x, h in zip(x_NTD, hidden_NTF, strict=True)]


@settings(deadline=None)
@given(seed=seeds, experts=st.integers(2, 5), rank=ranks, data=st.data())
def test_exact_where_residuals_are_of_that_rank(seed: int, experts: int, rank: int, data: st.DataObject) -> None:
    usage_N = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=experts, max_size=experts)))
    base_in, base_out = draw(seed, HIDDEN, 2 * WIDTH), draw(seed + 1, WIDTH, HIDDEN)
    change_N = draw(seed + 3, experts, rank, rank)
    change_N = change_N - usage_weighted_mean(change_N, usage_N)
    left, right = draw(seed + 4, HIDDEN, rank), draw(seed + 5, rank, WIDTH)
    w_in = base_in + torch.cat([left @ change_N @ right, -left @ change_N @ right], dim=2)
    w_out = base_out + right.T @ change_N @ left.T
    found = factorize_cluster(w_in, w_out, usage_N, rank).weights
    for e in range(experts):
        for mine, true in zip(expert_weights(found, e), (w_in[e], w_out[e]), strict=True):
            assert (mine - true).abs().max() <= 1e-9 * true.abs().max()


@settings(deadline=None)
@given(seed=seeds, experts=st.integers(1, 4), rank=ranks, whitened=st.booleans(), exact=st.booleans())
def test_never_worse_than_the_mean_alone(seed: int, experts: int, rank: int, whitened: bool, exact: bool) -> None:
    inputs = draw_inputs(seed, experts, 5) if whitened else None
    w_in, w_out = draw_experts(seed, experts)
    usage_N = torch.ones(experts)
    found = factorize_cluster(w_in, w_out, usage_N, rank, inputs=inputs, seed=None if exact else 1)
    for one in found.experts:
        assert all(error <= base + 1e-9 for error, base in zip(one.errors, one.base_errors, strict=True))


@settings(deadline=None)
@given(seed=seeds, rank=ranks, tokens=st.sampled_from([0, 3, 200]), full=st.booleans())
def test_whitening_never_loses_by_its_own_measure(seed: int, rank: int, tokens: int, full: bool) -> None:
    """With singular moments as well (3 tokens, or none), and with their diagonal alone."""
    (inputs,) = draw_inputs(seed, 1, tokens)
    if not full:
        assert inputs.x is not None
        assert inputs.hidden is not None
        inputs = WhiteningRoots.of_moments((inputs.x**2).sum(0), (inputs.hidden**2).sum(0))
    w_in, w_out = draw_experts(seed, 2)
    expert, base = ExpertMatrices(w_in[0], w_out[0]), ExpertMatrices(w_in[1], w_out[1])
    whitened = factorize_expert(expert, base, rank, inputs=inputs)
    plain = factorize_expert(expert, base, rank, check=inputs)
    assert not any(plain.whitened)
    for found, other in zip(whitened.errors, plain.errors, strict=True):
        assert found <= other + 1e-9


@given(seed=seeds, rank=ranks)
def test_errors_are_those_of_the_tokens(seed: int, rank: int) -> None:
    """The error of the gate by moments is that of its outputs on the tokens the moments are of."""
    x_TD, h_TF = draw(seed, 30, HIDDEN), draw(seed + 1, 30, WIDTH)
    w_in, w_out = draw_experts(seed, 3)
    inputs = [WhiteningRoots.of_moments(x_TD.T @ x_TD / 30, h_TF.T @ h_TF / 30)] * 3
    found = factorize_cluster(w_in, w_out, torch.ones(3), rank, inputs=inputs)
    for e, one in enumerate(found.experts):
        mine_in, mine_out = expert_weights(found.weights, e)
        for number, (told, mine, true) in enumerate(
            [
                (x_TD, mine_in[:, :WIDTH], w_in[e, :, :WIDTH]),
                (x_TD, mine_in[:, WIDTH:], w_in[e, :, WIDTH:]),
                (h_TF, mine_out, w_out[e]),
            ]
        ):
            expected = (told @ (mine - true)).norm() / (told @ true).norm()
            assert one.errors[number] == pytest.approx(float(expected), rel=1e-6)


def test_whitening_helps_where_inputs_lie_in_few_directions() -> None:
    direction = draw(0, 3, HIDDEN)
    x_TD = draw(1, 400, 3) @ direction + 0.05 * draw(2, 400, HIDDEN)
    fit, check = (WhiteningRoots.of_moments(x.T @ x, torch.ones(WIDTH, dtype=torch.float64)) for x in x_TD.chunk(2))
    w_in, w_out = draw_experts(3, 2)
    expert, base = ExpertMatrices(w_in[0], w_out[0]), ExpertMatrices(w_in[1], w_out[1])
    whitened = factorize_expert(expert, base, 3, inputs=fit, check=check)
    plain = factorize_expert(expert, base, 3, check=check)
    assert whitened.whitened == (True, True, False)
    assert whitened.errors[0] < 0.2 * plain.errors[0]


def test_tokens_held_back_refuse_a_whitening_that_does_not_generalise() -> None:
    x_TD, h_TF = torch.zeros(1, HIDDEN, dtype=torch.float64), torch.zeros(1, WIDTH, dtype=torch.float64)
    x_TD[0, 0] = h_TF[0, 0] = 1.0  # as if tokens had nothing but their first entry
    fit = WhiteningRoots.of_tokens(x_TD, h_TF)
    check = WhiteningRoots.of_moments(torch.eye(HIDDEN, dtype=torch.float64), torch.ones(WIDTH, dtype=torch.float64))
    w_in, w_out = draw_experts(3, 2)
    expert, base = ExpertMatrices(w_in[0], w_out[0]), ExpertMatrices(w_in[1], w_out[1])
    assert not any(factorize_expert(expert, base, 2, inputs=fit, check=check).whitened)


@pytest.mark.parametrize("tokens", [3, 50])
def test_tokens_are_a_root_of_their_moments(tokens: int) -> None:
    x_TD, h_TF, w_DF = draw(0, tokens, HIDDEN), draw(1, tokens, WIDTH), draw(2, HIDDEN, 5)
    for root in (WhiteningRoots.of_tokens(x_TD, h_TF), WhiteningRoots.of_moments(x_TD.T @ x_TD, h_TF.T @ h_TF)):
        torch.testing.assert_close(apply_root(root.x, w_DF).norm(), (x_TD @ w_DF).norm())
        assert root.x is not None
        assert len(root.x) <= HIDDEN


@settings(deadline=None, max_examples=20)
@given(seed=seeds, rank=st.integers(1, 8), decay=st.sampled_from([0.0, 0.5, 2.0]))
def test_the_randomised_search_is_as_good_as_the_exact_one(seed: int, rank: int, decay: float) -> None:
    """Within two per cent of the least possible error, for flat spectra as well."""
    left, right = (torch.linalg.qr(draw(seed + n, size, 40)).Q for n, size in enumerate((60, 80)))
    a_IO = left * torch.arange(1, 41).double() ** -decay @ right.T
    errors = []
    for q_OR in (leading_right_vectors(a_IO, rank, seed), leading_right_vectors(a_IO, rank)):
        torch.testing.assert_close(q_OR.T @ q_OR, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)
        errors.append(float((a_IO - a_IO @ q_OR @ q_OR.T).norm()))
    assert errors[1] <= errors[0] + 1e-9
    assert errors[0] <= 1.02 * errors[1]
    assert torch.equal(leading_right_vectors(a_IO, rank, seed), leading_right_vectors(a_IO, rank, seed))


def test_what_equals_its_base_can_still_learn() -> None:
    """Else U and V would both be zero, and without a gradient for ever."""
    w_in, w_out = draw_experts(0, 1)
    residual = factorize_cluster(w_in, w_out, torch.ones(1), 2).weights
    assert residual.in_u_NDR.abs().max() < 1e-12
    assert residual.in_v_NRH.std() == pytest.approx(0.02, rel=0.3)
    assert residual.out_v_NRD.std() == pytest.approx(0.02, rel=0.3)


def test_vectors_start_at_zero_and_change_nothing() -> None:
    w_in, w_out = draw_experts(0, 3)
    x_TD = draw(5, 7, HIDDEN)
    plain = factorize_cluster(w_in, w_out, torch.ones(3), 2).weights
    with_vectors = factorize_cluster(w_in, w_out, torch.ones(3), 2, vectors=True).weights
    assert plain.vectors() is None
    assert torch.equal(run_expert(x_TD, plain, 1), run_expert(x_TD, with_vectors, 1))


def test_mean_by_usage() -> None:
    w = torch.tensor([[[1.0]], [[4.0]]])
    assert float(usage_weighted_mean(w, torch.tensor([1, 2]))) == pytest.approx(3.0)
    assert float(usage_weighted_mean(w, torch.zeros(2))) == pytest.approx(2.5)


@given(seed=seeds)
def test_units_in_another_order_and_sign_are_found_again(seed: int) -> None:
    w_in, w_out = draw_experts(seed, 2)
    reference, near = ExpertMatrices(w_in[0], w_out[0]), ExpertMatrices(w_in[0] + 0.01 * w_in[1], w_out[0])
    order_F = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))
    sign_F = torch.where(draw(seed + 7, WIDTH) < 0, -1.0, 1.0)
    shuffled = UnitOrder(order_F, sign_F).apply(near)
    again = align_hidden_units(shuffled, reference).apply(shuffled)
    assert torch.equal(again.w_in_DH, near.w_in_DH)
    assert torch.equal(again.w_out_FD, near.w_out_FD)


@given(seed=seeds)
def test_alignment_keeps_the_function_and_comes_no_farther(seed: int) -> None:
    w_in, w_out = draw_experts(seed, 2)
    expert, reference = ExpertMatrices(w_in[0], w_out[0]), ExpertMatrices(w_in[1], w_out[1])
    aligned = align_hidden_units(expert, reference).apply(expert)
    x_TD = draw(seed + 9, 6, HIDDEN)
    torch.testing.assert_close(aligned(x_TD), expert(x_TD))
    assert _distance(aligned, reference) <= _distance(expert, reference) + 1e-9


@given(seed=seeds, rank=ranks)
def test_with_residual_is_the_experts_effective_weight(seed: int, rank: int) -> None:
    w_in, w_out = draw_experts(seed, 3)
    found = factorize_cluster(w_in, w_out, torch.ones(3), rank)
    base = ExpertMatrices(found.weights.base_in_DH, found.weights.base_out_FD)
    x_TD = draw(seed + 9, 6, HIDDEN)
    for e, one in enumerate(found.experts):
        torch.testing.assert_close(base.with_residual(one.residual)(x_TD), run_expert(x_TD, found.weights, e))


def test_errors_are_relative() -> None:
    y = torch.tensor([3.0, 4.0])
    assert relative_error(1.25 * y, y) == pytest.approx(0.25)
    assert relative_error(y[:0], y[:0]) == 0
    assert relative_error(y, torch.zeros(2)) == 1


def _distance(a: ExpertMatrices, b: ExpertMatrices) -> float:
    return float(((a.w_in_DH - b.w_in_DH) ** 2).sum() + ((a.w_out_FD - b.w_out_FD) ** 2).sum())


@pytest.mark.parametrize(("rank", "why"), [(0, "must be >= 1"), (13, "must be in 0 to 12")])
def test_a_rank_that_cannot_be_is_refused(rank: int, why: str) -> None:
    w_in, w_out = draw_experts(0, 2)
    with pytest.raises(ValueError, match=f"rank={rank} {why}"):
        factorize_cluster(w_in, w_out, torch.ones(2), rank)
