"""Two-level bases: W_i = B + P_c Q_c + U_i V_i, by materialized weights and by hand-counted parameters."""

import pytest
import torch
from torch.nn import functional

from moe_dist import ClusteredMoE, MoEConfig
from moe_dist.config import load_config
from moe_dist.errors import ConfigError

MOE = MoEConfig(
    experts=6, clusters=3, top_k=1, expert_hidden=10, rank=2, base="shared+cluster", base_rank=3, expert_vectors=False
)


def _layer() -> ClusteredMoE:
    layer = ClusteredMoE(8, MOE, init_std=0.4)
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.4
    return layer.double()


def test_an_expert_is_the_sum_of_shared_base_cluster_part_and_residual() -> None:
    layer = _layer()
    assert layer.shared_base is not None
    x_TD = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = dict(layer.named_parameters())
    for token, y_D in zip(x_TD, layer(x_TD), strict=True):
        prototypes = state["router.weight_ED"].view(3, 2, 8).sum(1) / 2**0.5
        cluster = int((prototypes @ token).argmax())
        slot = int((state["router.weight_ED"].view(3, 2, 8)[cluster] @ token).argmax())
        part = {name.removeprefix(f"clusters.{cluster}."): value for name, value in state.items()}
        u_DC, v_CF = part["residuals.in_u_NDR"][slot], part["residuals.in_v_NRH"][slot]
        w_in = state["shared_base.w_in_DH"] + part["base.in_p_DR"] @ part["base.in_q_RH"]
        w_in = w_in + torch.cat([u_DC[:, :2] @ v_CF[0], u_DC[:, 2:] @ v_CF[1]], dim=1)
        w_out = state["shared_base.w_out_FD"] + part["base.out_p_FR"] @ part["base.out_q_RD"]
        w_out = w_out + part["residuals.out_u_NFR"][slot] @ part["residuals.out_v_NRD"][slot]
        gate, up = (token @ w_in).chunk(2)
        torch.testing.assert_close(y_D, (functional.silu(gate) * up) @ w_out)


def test_both_levels_get_gradients_and_all_clusters_train_the_shared_one() -> None:
    layer = _layer()
    layer(torch.randn(64, 8, dtype=torch.float64)).square().sum().backward()
    assert layer.shared_base is not None
    assert layer.shared_base.w_in_DH.grad is not None
    for name in ("in_p_DR", "in_q_RH", "out_p_FR", "out_q_RD"):
        for cluster in layer.clusters:
            assert cluster.base.get_parameter(name).grad is not None  # type: ignore[union-attr]


def test_clusters_start_from_the_same_shared_base_and_differ_by_their_parts() -> None:
    layer = ClusteredMoE(8, MOE)
    bases = [part.parameter_weights().base_in_DH for part in layer.clusters]  # type: ignore[operator]
    first, second = bases[:2]
    assert not torch.equal(first, second)
    assert layer.shared_base is not None
    assert float((first - layer.shared_base.w_in_DH).detach().norm()) < float(layer.shared_base.w_in_DH.detach().norm())


def test_parameters_by_hand() -> None:
    shared, part, residual, router = 3 * 8 * 10, 3 * (2 * 8 + 3 * 10), 3 * 2 * (8 + 10), 6 * 8
    assert sum(p.numel() for p in ClusteredMoE(8, MOE).parameters()) == shared + 3 * part + 6 * residual + router
    counted = MOE.layer_kind.parameters(8, MOE, cluster=3, shard=1)
    assert counted == (router + shared, part, 2 * residual)


def test_a_rank_that_a_refit_cannot_make_is_refused() -> None:
    words = ["moe.base=shared+cluster", "model.hidden_size=32", "moe.base_rank=33", "recluster.transition=refit"]
    with pytest.raises(ConfigError, match=r"moe\.base_rank=33 is more than experts of model\.hidden_size=32"):
        load_config(None, words)
