"""The fast clustered layer against its definition, values and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.config import ModelConfig, MoEConfig
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.router_losses import balance_loss, z_loss
from tests.oracles.clustered_moe import clustered_moe_reference


def build(moe: MoEConfig, seed: int = 0) -> ClusteredMoE:
    model = ModelConfig(hidden_size=16, heads=2, layers=2)
    mesh = Mesh.alone()
    placement = ExpertPlacement.contiguous(moe.experts, moe.clusters, mesh.shape)
    balance = BalanceState.create(model.layers, moe, torch.device("cpu"))
    context = LayerContext(mesh, [placement] * 2, balance, TrafficLedger(Links.alone()), seed)
    layer = ClusteredMoE.in_model(1, model, moe, context, 1.0)
    draw = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():  # large enough that every part of the formula shows
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.5
    balance.cluster_bias_LG.copy_(torch.randn(balance.cluster_bias_LG.shape, generator=draw))
    balance.expert_bias_LE.copy_(torch.randn(balance.expert_bias_LE.shape, generator=draw))
    return layer


def outputs_and_gradients(layer: ClusteredMoE, x_TD: Tensor, y_TD: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)
    gradients = torch.autograd.grad((y_TD * weight).sum(), [x_TD, *layer.parameters()], allow_unused=True)
    shapes = [x_TD, *layer.parameters()]
    return [y_TD, *(torch.zeros_like(s) if g is None else g for s, g in zip(shapes, gradients, strict=True))]


@settings(max_examples=40)
@given(st.data())
def test_layer_is_its_definition(data: st.DataObject) -> None:
    clusters, per_cluster = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 3]))
    moe = MoEConfig(
        experts=clusters * per_cluster,
        clusters=clusters,
        top_clusters=data.draw(st.integers(1, clusters)),
        top_k=data.draw(st.integers(1, per_cluster)),
        expert_hidden=12,
        gate_scale=data.draw(st.sampled_from([1.0, 3.0])),
        rank=data.draw(st.integers(1, 3)),
        expert_vectors=data.draw(st.booleans()),
    )
    layer = build(moe, data.draw(st.integers(0, 1000))).double()  # in float32 the router's gradients cancel
    tokens = data.draw(st.integers(1, 9))
    draw = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, 16, generator=draw, dtype=torch.float64, requires_grad=True)
    fast = outputs_and_gradients(layer, x_TD, layer(x_TD))
    slow = outputs_and_gradients(layer, x_TD, clustered_moe_reference(layer, x_TD))
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("top_clusters", [1, 2])
def test_counts_every_routed_copy_once_and_none_while_not_counting(top_clusters: int) -> None:
    layer = build(MoEConfig(experts=8, clusters=4, top_clusters=top_clusters, top_k=2, expert_hidden=12, rank=2))
    layer(torch.randn(3, 5, 16))
    assert int(layer.balance.count_LE[1].sum()) == 15 * 2 * top_clusters
    assert int(layer.balance.count_LE[0].sum()) == 0
    layer.balance.counting = False
    layer(torch.randn(3, 5, 16))
    assert int(layer.balance.count_LE[1].sum()) == 15 * 2 * top_clusters


def test_an_expert_bias_moves_the_choice_but_not_the_gate() -> None:
    layer = build(MoEConfig(experts=4, clusters=2, top_clusters=1, top_k=2, expert_hidden=12, rank=2))
    x_TD = torch.randn(6, 16)
    before = layer(x_TD)
    layer.balance.expert_bias_LE += torch.randn(layer.balance.expert_bias_LE.shape)  # both experts are chosen anyway
    torch.testing.assert_close(layer(x_TD), before)
    layer.balance.cluster_bias_LG[1] = torch.tensor([100.0, 0.0])
    layer.balance.count_LE.zero_()
    layer(x_TD)
    assert layer.balance.count_LE[1].tolist() == [6, 6, 0, 0]


def test_no_tokens_at_all() -> None:
    for top_clusters in (1, 2):
        layer = build(MoEConfig(experts=8, clusters=4, top_clusters=top_clusters, expert_hidden=12, rank=2))
        x_TD = torch.zeros(0, 16, requires_grad=True)
        layer(x_TD).sum().backward()
        assert x_TD.grad is not None


@pytest.mark.parametrize("top_clusters", [1, 2])
def test_capacity_drops_what_is_too_much_and_counts_it(top_clusters: int) -> None:
    moe = MoEConfig(experts=8, clusters=4, top_clusters=top_clusters, top_k=1, expert_hidden=16, rank=2)
    dropless, layer = build(moe), build(moe.model_copy(update={"capacity_factor": 0.25}))
    ample = build(moe.model_copy(update={"capacity_factor": 100.0}))
    x_TD = torch.randn(16, 16, requires_grad=True)
    torch.testing.assert_close(ample(x_TD), dropless(x_TD))
    assert int(ample.balance.dropped_L.sum()) == 0
    y_TD = layer(x_TD)
    y_TD.sum().backward()
    assert x_TD.grad is not None
    assert bool(x_TD.grad.isfinite().all())
    kept = int(layer.balance.count_LE.sum() - layer.balance.dropped_L.sum())
    dropped = int(layer.balance.dropped_L.sum())
    routed = 16 * top_clusters
    in_stage_one = routed - int(layer.balance.count_LE.sum())
    assert 0 < kept + in_stage_one <= routed
    assert 0 < dropped < routed
    assert int((y_TD.detach().abs().sum(1) > 0).sum()) <= routed - dropped


def test_router_losses_reach_the_router_of_both_stages() -> None:
    x_TD = torch.randn(12, 16)
    settings_of: list[dict[str, object]] = [{"balance": "aux_loss", "aux_loss_weight": 1.0}, {"z_loss_weight": 1.0}]
    for entry, keys in enumerate(settings_of):
        moe = MoEConfig(experts=8, clusters=4, top_k=1, expert_hidden=16, rank=2)
        plain, pushed = build(moe), build(moe.model_copy(update=keys))
        gradients = []
        for layer in (plain, pushed):
            layer(x_TD).square().sum().backward()
            gradients.append(layer.router.weight_ED.grad)
        difference_ED = gradients[1] - gradients[0]  # type: ignore[operator]
        assert bool((difference_ED.abs().sum(1) > 0).all()), keys
        within_GD = difference_ED.view(4, 2, 16) - difference_ED.view(4, 2, 16).mean(1, keepdim=True)
        assert bool((within_GD.abs().sum((1, 2)) > 0).any()), f"{keys}: stage two, where siblings differ"
        assert plain.balance.router_loss_2.tolist() == [0, 0]
        told = pushed.balance.router_loss_2.clone()
        assert float(told[1 - entry]) == 0
        logits_TG = pushed.router.cluster_logits(x_TD, pushed.member_GN)
        cluster_T1 = logits_TG.argmax(1, keepdim=True)
        stage_one = (balance_loss(logits_TG, cluster_T1), z_loss(logits_TG))[entry].detach() / len(x_TD)
        assert float(told[entry]) > float(stage_one) > 0, f"{keys}: stage one and stage two"
        with torch.no_grad():
            pushed(x_TD)
        assert torch.equal(pushed.balance.router_loss_2, told)
