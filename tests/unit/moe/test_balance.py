"""Selection biases: against a plain formula, and that they do balance."""

import torch
from hypothesis import given
from hypothesis import strategies as st

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
