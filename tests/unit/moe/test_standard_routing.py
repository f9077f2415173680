"""Standard top-k routing: a bias moves the choice, and gates are a softmax over the chosen experts."""

import math

import pytest
import torch

from moe_dist.config import ModelConfig, MoEConfig
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.scoring import Scoring
from moe_dist.moe.standard_moe import StandardMoE
from moe_dist.moe.topk_routing import choose_flat

LOGITS = torch.tensor([[0.0, math.log(2.0), math.log(6.0), -1.0]])
BIAS = torch.tensor([5.0, 0.0, 0.0, 0.0])


def test_gates_are_a_softmax_over_the_chosen_logits_without_the_bias() -> None:
    choice = choose_flat(LOGITS, BIAS, 2)
    assert choice.expert_TK.tolist() == [[0, 2]], "the bias brings expert 0 before expert 1"
    assert choice.gate_TK[0].tolist() == pytest.approx([1 / 7, 6 / 7])


def test_a_single_gate_is_the_probability_over_all_experts() -> None:
    choice = choose_flat(LOGITS, BIAS, 1)
    assert choice.expert_TK.tolist() == [[0]]
    assert choice.gate_TK.item() == pytest.approx(1 / (1 + 2 + 6 + math.exp(-1)))


def test_gates_that_are_not_normalized_are_probabilities_over_all_experts() -> None:
    choice = choose_flat(LOGITS, BIAS, 2, normalize=False)
    total = 1 + 2 + 6 + math.exp(-1)
    assert choice.gate_TK[0].tolist() == pytest.approx([1 / total, 6 / total])


@pytest.mark.parametrize("factor", [None, 1.0])
def test_a_layer_is_the_gated_sum_of_its_experts(factor: float | None) -> None:
    """With a capacity of one even share, 8 copies of 4 experts, the first two copies of an expert are computed."""
    moe = MoEConfig(kind="standard", experts=4, top_k=2, expert_hidden=6, gate_scale=3.0, capacity_factor=factor)
    mesh = Mesh.alone()
    context = LayerContext.standalone(moe, mesh, 0)
    layer = StandardMoE.in_model(0, ModelConfig(hidden_size=8, heads=2, layers=1), moe, context, 1.0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.5
    context.balance.expert_bias_LE.copy_(torch.tensor([[0.0, 2.0, 0.0, 0.0]]))
    x_TD = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    choice = choose_flat(x_TD @ layer.router.weight_ED.T, context.balance.expert_bias_LE[0], 2)
    left, expected = dict.fromkeys(range(4), 2 if factor else 99), torch.zeros(4, 8)
    for token in range(4):
        for expert, gate in zip(choice.expert_TK[token].tolist(), choice.gate_TK[token], strict=True):
            left[expert] -= 1
            if left[expert] >= 0:
                pre = x_TD[token] @ layer.experts.w_in[expert]
                hidden = torch.nn.functional.silu(pre[:6]) * pre[6:]
                expected[token] += 3 * gate * (hidden @ layer.experts.w_out[expert])
    torch.testing.assert_close(layer(x_TD), expected)
    over = sum(-count for count in left.values() if count < 0)
    assert int(context.balance.dropped_L[0]) == over
    assert (over > 0) is (factor is not None)


def test_groups_and_sigmoids_by_hand() -> None:
    """Two groups of two: the largest logit is in the first, the largest sum of two sigmoids in the second."""
    logits, bias = torch.tensor([[3.0, -9.0, 1.0, 1.0]]), torch.zeros(4)
    largest = choose_flat(logits, bias, 2, scoring=Scoring(groups=2, top_groups=1))
    assert sorted(largest.expert_TK[0].tolist()) == [0, 1]
    sums = choose_flat(logits, bias, 2, scoring=Scoring(sigmoid=True, groups=2, top_groups=1))
    assert sorted(sums.expert_TK[0].tolist()) == [2, 3]
    torch.testing.assert_close(sums.gate_TK, torch.tensor([[0.5, 0.5]]))
    plain = choose_flat(logits, torch.tensor([0.0, 2.0, 0.0, 0.0]), 2, scoring=Scoring(sigmoid=True))
    gates = torch.tensor([3.0, -9.0]).sigmoid()
    assert sorted(plain.expert_TK[0].tolist()) == [0, 1], "a bias is added to sigmoids"
    torch.testing.assert_close(plain.gate_TK.sort().values[0], (gates / gates.sum()).sort().values)
    alone = choose_flat(logits, bias, 2, normalize=False, scoring=Scoring(sigmoid=True))
    torch.testing.assert_close(alone.gate_TK[0, 0], torch.tensor(3.0).sigmoid())
