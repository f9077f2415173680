"""Adam's moments follow the chain rule from a full expert to base and factors."""

import torch
from torch import Tensor

from moe_dist.compression import ExpertMatrices, ExpertResidual, init_residual, project_first, project_second

HIDDEN, WIDTH, RANK = 6, 9, 2


def _residual(seed: int, vectors: bool) -> ExpertResidual:
    return init_residual(HIDDEN, WIDTH, RANK, vectors, torch.Generator().manual_seed(seed))


def test_first_moments_are_the_gradients_that_autograd_finds() -> None:
    """Of a loss that is linear in the effective weights, so that G is their gradient."""
    base = ExpertMatrices(torch.randn(HIDDEN, 2 * WIDTH), torch.randn(WIDTH, HIDDEN))
    gradient = ExpertMatrices(torch.randn(HIDDEN, 2 * WIDTH), torch.randn(WIDTH, HIDDEN))
    residual = _residual(0, vectors=False)
    leaves = {name: value.requires_grad_() for name, value in vars(residual).items() if value is not None}
    effective = base.with_residual(residual)
    loss = (effective.w_in_DH * gradient.w_in_DH).sum() + (effective.w_out_FD * gradient.w_out_FD).sum()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = vars(project_first(gradient, residual))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_second_moments_are_those_of_independent_gradients() -> None:
    """The mean over many drawn gradients of the squares of what they give the factors."""
    generator = torch.Generator().manual_seed(0)
    residual = _residual(1, vectors=True)
    spread = ExpertMatrices(
        torch.rand(HIDDEN, 2 * WIDTH, generator=generator), torch.rand(WIDTH, HIDDEN, generator=generator)
    )

    def squares() -> dict[str, Tensor]:
        drawn = (torch.randn(w.shape, generator=generator) * w for w in (spread.w_in_DH, spread.w_out_FD))
        first = project_first(ExpertMatrices(*drawn), residual)
        return {name: value**2 for name, value in vars(first).items()}

    draws = [squares() for _ in range(4000)]
    found = vars(project_second(ExpertMatrices(spread.w_in_DH**2, spread.w_out_FD**2), residual))
    for name in ("in_u_DR", "in_v_RH", "out_u_FR", "out_v_RD"):
        mean = torch.stack([one[name] for one in draws]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=0.15, atol=0)
    for name in ("hidden_gate_F", "hidden_bias_H", "output_bias_D"):
        assert not found[name].any()
