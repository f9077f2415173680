"""Initial values follow the recipe and their generator, nothing else."""

import pytest
import torch

from moe_dist.compression import init_base, init_residual


def test_base_has_the_given_deviations() -> None:
    w_in, w_out = init_base(128, 256, 0.02, 0.005, torch.Generator().manual_seed(0))
    assert w_in.shape == (128, 512)
    assert w_out.shape == (256, 128)
    assert w_in.std().item() == pytest.approx(0.02, rel=0.02)
    assert w_out.std().item() == pytest.approx(0.005, rel=0.02)


def test_residual_follows_the_recipe() -> None:
    residual = init_residual(128, 256, 8, True, torch.Generator().manual_seed(0))
    assert residual.in_u_DR.std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert residual.in_v_RH.std().item() == pytest.approx(0.02, rel=0.1)
    assert residual.out_u_FR.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert residual.out_v_RD.std().item() == pytest.approx(0.02, rel=0.1)
    for vector, width in ((residual.hidden_gate_F, 256), (residual.hidden_bias_H, 512), (residual.output_bias_D, 128)):
        assert vector is not None
        assert torch.equal(vector, torch.zeros(width))
    assert init_residual(128, 256, 8, False, torch.Generator().manual_seed(0)).hidden_gate_F is None


def test_values_depend_on_the_generator_only() -> None:
    torch.manual_seed(1)
    first = init_residual(16, 32, 2, True, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    second = init_residual(16, 32, 2, False, torch.Generator().manual_seed(5))
    assert torch.equal(first.in_u_DR, second.in_u_DR)
    assert torch.equal(first.out_v_RD, second.out_v_RD)
