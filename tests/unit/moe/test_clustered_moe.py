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
from moe_dist.moe.attached_loss import attach_loss
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.router_losses import balance_loss, z_loss
from moe_dist.moe.routing_statistics import RoutingStatistics
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


def test_statistics_are_those_of_training_passes_and_their_gates() -> None:
    """Both clusters and both experts of each are chosen by every token: all experts see the tokens, by their gates."""
    layer = build(MoEConfig(experts=4, clusters=2, top_clusters=2, top_k=2, expert_hidden=12, rank=2))
    statistics = RoutingStatistics.create(2, 16, layer.moe, 0.5)
    object.__setattr__(layer.context, "statistics", statistics)
    statistics.collecting = True
    x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    layer.balance.counting = False
    layer(x_TD)
    assert not statistics.together_LGG.any(), "an evaluation leaves no trace in the pairs"
    assert not statistics.activation[1].mass_E.any(), "an evaluation leaves no trace in the means"
    layer.balance.counting = True
    layer(x_TD)
    assert statistics.together_LGG[1].tolist() == [[5, 5], [5, 5]]
    logits_TE = x_TD @ layer.router.weight_ED.detach().T
    gates_TE = logits_TE.view(5, 2, 2).softmax(-1).view(5, 4)
    torch.testing.assert_close(statistics.activation[1].mass_E, gates_TE.sum(0))
    torch.testing.assert_close(statistics.activation[1].weighted_ED, gates_TE.T @ x_TD)


def _forced(cluster_bias: list[float], expert_bias: list[float], **keys: object) -> ClusteredMoE:
    """Layer of four experts in two clusters, in which biases decide all choices."""
    moe = MoEConfig.model_validate({"experts": 4, "clusters": 2, "top_k": 1, "expert_hidden": 12, "rank": 2, **keys})
    layer = build(moe)
    layer.balance.cluster_bias_LG[1] = 1e4 * torch.tensor(cluster_bias)
    layer.balance.expert_bias_LE[1] = 1e4 * torch.tensor(expert_bias)
    return layer


def test_loads_are_counted_by_the_number_of_the_expert() -> None:
    layer = _forced([0, 1], [1, 0, 0, 1])
    layer(torch.randn(6, 16))
    assert layer.balance.count_LE[1].tolist() == [0, 0, 0, 6], "all tokens choose expert 3, in slot 1 of cluster 1"


def test_an_expert_s_capacity_is_its_share_of_all_copies() -> None:
    """8 tokens in both clusters: 16 copies for 4 experts, 4 each; experts 0 and 2 are chosen by all tokens."""
    layer = _forced([0, 0], [1, 0, 1, 0], top_clusters=2, capacity_factor=1.0)
    layer(torch.randn(8, 16))
    assert layer.balance.count_LE[1].tolist() == [8, 0, 8, 0]
    assert int(layer.balance.dropped_L[1]) == 4 + 4


def test_a_row_that_its_cluster_has_no_room_for_loses_all_its_copies() -> None:
    """8 tokens choose cluster 0, which takes half of an even share of 4; 6 rows of 2 experts are dropped."""
    layer = _forced([1, 0], [0, 0, 0, 0], top_k=2, capacity_factor=0.5)
    layer(torch.randn(8, 16))
    assert int(layer.balance.dropped_L[1]) == 6 * 2
    assert layer.balance.count_LE[1].tolist() == [2, 2, 0, 0]


def test_router_losses_are_means_over_tokens_of_both_stages() -> None:
    layer = _forced([1, 0], [0, 0, 0, 0], top_k=2, z_loss_weight=0.25, balance="aux_loss", aux_loss_weight=0.5)
    x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    layer(x_TD)
    embedding_ED = layer.router.weight_ED.detach()
    stage_one_TG = x_TD @ (embedding_ED.view(2, 2, 16).sum(1) / 2**0.5).T
    stage_two_TN = x_TD @ embedding_ED[:2].T
    z = sum(float((torch.logsumexp(logits, 1) ** 2).sum()) for logits in (stage_one_TG, stage_two_TN))
    probability = float(stage_one_TG.softmax(1)[:, 0].sum())  # all tokens choose cluster 0, and both its experts
    told = layer.balance.router_loss_2
    assert float(told[1]) == pytest.approx(0.25 * z / 5, rel=1e-5)
    assert float(told[0]) == pytest.approx(0.5 * (2 * probability + 5) / 5, rel=1e-5)


def test_an_attached_loss_has_the_gradient_of_its_scale_alone() -> None:
    x, loss = torch.ones(3, requires_grad=True), torch.tensor(7.0, requires_grad=True)
    y = attach_loss(x, loss, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]
    assert loss.grad == 0.25


@pytest.mark.parametrize("top_clusters", [1, 2])
def test_kept_tokens_have_their_outputs_and_dropped_ones_none(top_clusters: int) -> None:
    """Clusters of one expert take the first two tokens that choose them."""
    moe = MoEConfig(experts=3, clusters=3, top_clusters=top_clusters, top_k=1, expert_hidden=12, rank=2)
    factor = 2 * 3 / (9 * top_clusters)
    whole, layer = build(moe), build(moe.model_copy(update={"capacity_factor": factor}))
    x_TD = torch.randn(9, 16, generator=torch.Generator().manual_seed(3))
    chosen_TM = whole.route(x_TD, 1).cluster_TM
    left, kept = dict.fromkeys(range(3), 2), []
    for token, clusters in enumerate(chosen_TM.tolist()):
        room = [left[cluster] > 0 for cluster in clusters]
        for cluster, free in zip(clusters, room, strict=True):
            left[cluster] -= free
        kept.append((token, sum(room)))
    complete = [token for token, number in kept if number == top_clusters]
    nothing = [token for token, number in kept if number == 0]
    assert complete
    assert nothing
    y_TD = layer(x_TD)
    torch.testing.assert_close(y_TD[complete], whole(x_TD)[complete])
    assert not y_TD[nothing].any()
