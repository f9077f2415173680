"""Two-stage decisions on cases small enough to see."""

import pytest
import torch

from moe_dist.moe.two_stage_routing import choose_clusters, choose_experts, cluster_prototypes, single_cluster_gate


def test_prototypes_point_where_their_experts_point_and_follow_them() -> None:
    embedding_ED = torch.tensor([[2.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, -2.0]])
    together_GN = torch.tensor([[0, 2], [1, 3]])
    torch.testing.assert_close(cluster_prototypes(embedding_ED, together_GN), torch.tensor([[6.0, 0], [0, 0]]) / 2**0.5)
    moved_GN = torch.tensor([[0, 1], [2, 3]])
    torch.testing.assert_close(cluster_prototypes(embedding_ED, moved_GN), torch.tensor([[2.0, 2], [4, -2]]) / 2**0.5)


def test_a_bias_changes_the_choice_only() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert choose_clusters(logits, torch.zeros(3), 1).tolist() == [[2]]
    assert choose_clusters(logits, torch.tensor([0.0, 1.5, 0.0]), 1).tolist() == [[1]]
    choice = choose_experts(logits, torch.tensor([5.0, 0.0, 0.0]), 2, only_gate=True)
    assert sorted(choice.slot_RK[0].tolist()) == [0, 2]
    weights = dict(zip(choice.slot_RK[0].tolist(), choice.gate_RK[0].tolist(), strict=True))
    assert weights[2] == pytest.approx(torch.tensor([1.0, 3.0]).softmax(0)[1].item())
    assert float(choice.log_mass_R) == pytest.approx(torch.tensor([1.0, 3.0]).logsumexp(0).item())


def test_gates_that_are_not_normalized_are_a_softmax_over_the_cluster() -> None:
    logits = torch.tensor([[1.0, 2.0, 6.0]]).log()
    choice = choose_experts(logits, torch.zeros(3), 2, only_gate=True, normalize=False)
    assert choice.slot_RK.tolist() == [[2, 1]]
    assert choice.gate_RK[0].tolist() == pytest.approx([6 / 9, 2 / 9])
    assert float(choice.log_mass_R.exp()) == pytest.approx(9.0)


def test_a_gate_over_one_choice_is_one_and_has_a_gradient() -> None:
    logits = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    gate = single_cluster_gate(logits, torch.tensor([[2]]))
    assert float(gate.detach()) == 1.0
    gate.sum().backward()
    expected = torch.tensor([[0.0, 0.0, 1.0]]) - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected)
    only = choose_experts(logits, torch.zeros(3), 1, only_gate=True)
    shared = choose_experts(logits, torch.zeros(3), 1, only_gate=False)
    assert only.gate_RK.tolist() == shared.gate_RK.tolist() == [[1.0]]
    (gradient,) = torch.autograd.grad(only.gate_RK.sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_a_gate_stays_finite_however_unlikely_the_choice() -> None:
    logits = torch.tensor([[0.0, 1000.0]], requires_grad=True)  # a bias made it choose the first
    gate = single_cluster_gate(logits, torch.tensor([[0]]))
    gate.sum().backward()
    assert float(gate.detach()) == 1.0
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
