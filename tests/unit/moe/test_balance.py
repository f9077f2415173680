"""Selection biases: against a plain formula, and that they do balance."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import MoEConfig
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.selection_bias import update_expert_bias, update_two_stage_bias
from moe_dist.moe.topk_routing import choose_flat


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_two_stage_bias_is_its_formula(clusters: int, slots: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    experts, rate = clusters * slots, 0.02
    orders = [torch.randperm(experts, generator=draw).tolist() for _ in range(2)]
    members = [[order[c * slots : (c + 1) * slots] for c in range(clusters)] for order in orders]
    count_LE = torch.randint(0, 5, (2, experts), generator=draw)
    cluster_bias_LG, expert_bias_LE = torch.zeros(2, clusters), torch.zeros(2, experts)
    update_two_stage_bias(cluster_bias_LG, expert_bias_LE, count_LE, members, rate)
    for layer in range(2):
        count = count_LE[layer].tolist()
        for c, cluster in enumerate(members[layer]):
            load = sum(count[e] for e in cluster)
            assert _same_sign(cluster_bias_LG[layer, c], sum(count) - load * clusters)
            for e in cluster:
                assert _same_sign(expert_bias_LE[layer, e], load - count[e] * slots)
    assert set(cluster_bias_LG.abs().flatten().tolist()) <= {0.0, float(torch.tensor(rate))}


def _same_sign(value: torch.Tensor, expected: int) -> bool:
    return bool(torch.sign(value) == (expected > 0) - (expected < 0))


def test_expert_bias_balances_a_skewed_router() -> None:
    draw = torch.Generator().manual_seed(0)
    skew_E = torch.linspace(0, 2, 8)
    bias_LE = torch.zeros(1, 8)
    for _ in range(400):
        logits_TE = torch.randn(512, 8, generator=draw) + skew_E
        expert_TK = choose_flat(logits_TE, bias_LE[0], 2).expert_TK
        count_LE = torch.bincount(expert_TK.flatten(), minlength=8)[None]
        update_expert_bias(bias_LE, count_LE, 0.02)
    unbiased = torch.bincount(choose_flat(logits_TE, torch.zeros(8), 2).expert_TK.flatten(), minlength=8).double()
    balanced = count_LE[0].double()
    assert balanced.var() < unbiased.var() / 20


def _state(**keys: object) -> BalanceState:
    moe = MoEConfig.model_validate({"experts": 4, "clusters": 2, "top_k": 1, **keys})
    return BalanceState.create(1, moe, torch.device("cpu"))


def test_copies_are_counted_each_and_cleared_together() -> None:
    state = _state()
    state.count(0, torch.tensor([3, 1, 3, 3]))
    state.drop(0, torch.tensor([False, True, False, False]), copies=2)
    state.router_loss_2 += 1
    assert state.count_LE.tolist() == [[0, 1, 0, 3]]
    assert state.dropped_L.tolist() == [6], "three rows of two copies"
    state.clear_counts()
    assert not any(tensor.any() for tensor in (state.count_LE, state.dropped_L, state.router_loss_2))
    state.counting = False
    state.count(0, torch.tensor([3]))
    state.drop(0, torch.tensor([False]))
    assert not state.count_LE.any()
    assert not state.dropped_L.any()


def test_biases_move_against_the_load_of_clusters_and_of_experts_in_them() -> None:
    """Cluster (3, 0) has 6 of 8 copies, most of them at expert 3; cluster (2, 1) has 2, all of them at expert 1."""
    state = _state(balance_rate=0.5)
    placement = ExpertPlacement(((3, 0), (2, 1)), (0, 0), 1, 1)
    state.update(torch.tensor([[1, 2, 0, 5]]), [placement])
    assert state.cluster_bias_LG.tolist() == [[-0.5, 0.5]]
    assert state.expert_bias_LE.tolist() == [[0.5, -0.5, 0.5, -0.5]]


def test_standard_biases_move_against_the_load() -> None:
    state = _state(balance_rate=0.5)
    state.update(torch.tensor([[1, 2, 0, 5]]), [])
    assert state.expert_bias_LE.tolist() == [[0.5, 0.0, 0.5, -0.5]]


def test_the_auxiliary_loss_has_its_weight() -> None:
    state = _state(balance="aux_loss", aux_loss_weight=0.25)
    found = state.balancer.loss(torch.zeros(4, 4), torch.arange(4)[:, None])
    assert found is not None
    assert (found[0].item(), found[1]) == (4, 0.25)
    assert _state(balance="aux_loss", aux_loss_weight=0.0).balancer.loss(torch.zeros(4, 4), torch.zeros(4, 1)) is None


def test_biases_are_restored_as_they_were() -> None:
    first, second = _state(), _state()
    first.expert_bias_LE += 2
    second.expert_bias_LE += 5
    second.load_state_dict(first.state_dict())
    assert second.expert_bias_LE.tolist() == [[2.0] * 4]
