"""The gate of a single cluster: its value, and a gradient that knows better from larger."""

import torch
from torch import Tensor

from moe_dist.model.advantage_gate import GateBaseline, advantage_gate


def _baseline(*means: float) -> GateBaseline:
    baseline = GateBaseline.create(2, len(means), torch.device("cpu"))
    baseline.mean_LG[1] = torch.tensor(means)
    return baseline


def _gradient(logits_TG: Tensor, cluster_T1: Tensor, baseline: GateBaseline, gain_T: Tensor, scale: float) -> Tensor:
    """Of sum_t scale * gain_t * gate_t."""
    logits_TG = logits_TG.clone().requires_grad_()
    gate_T1 = advantage_gate(logits_TG, cluster_T1, baseline, 1, scale)
    assert torch.equal(gate_T1, torch.ones_like(gate_T1))
    (scale * gain_T * gate_T1[:, 0]).sum().backward()
    assert logits_TG.grad is not None
    return logits_TG.grad


def test_without_a_baseline_it_is_the_gradient_of_the_log_probability() -> None:
    torch.manual_seed(0)
    logits_TG, cluster_T1, gain_T = torch.randn(6, 3), torch.tensor([[0], [1], [1], [2], [0], [1]]), torch.randn(6)
    plain_TG = logits_TG.clone().requires_grad_()
    (0.1 * gain_T * plain_TG.log_softmax(1).gather(1, cluster_T1)[:, 0]).sum().backward()
    found_TG = _gradient(logits_TG, cluster_T1, _baseline(0.0, 0.0, 0.0), gain_T, 0.1)
    torch.testing.assert_close(found_TG, plain_TG.grad)


def test_what_all_tokens_of_a_cluster_gain_moves_no_logit() -> None:
    cluster_T1 = torch.tensor([[0], [0], [1]])
    grad_TG = _gradient(torch.randn(3, 2), cluster_T1, _baseline(-2.0, 5.0), torch.tensor([-2.0, -2.0, 5.0]), 0.25)
    torch.testing.assert_close(grad_TG, torch.zeros(3, 2))


def test_a_token_that_gains_more_than_the_mean_raises_its_cluster() -> None:
    cluster_T1 = torch.tensor([[0], [0]])
    grad_TG = _gradient(torch.zeros(2, 2), cluster_T1, _baseline(-2.0, 0.0), torch.tensor([-3.0, -1.0]), 1.0)
    assert grad_TG[0, 0] < 0 < grad_TG[0, 1], "descent raises the logit of the cluster that served it well"
    assert grad_TG[1, 0] > 0 > grad_TG[1, 1]


def test_the_baseline_is_the_mean_of_the_step_before_whatever_the_batches() -> None:
    gain_T, cluster_T1 = torch.tensor([1.0, 2.0, 6.0, -4.0]), torch.tensor([[0], [0], [0], [1]])
    whole, parts = _baseline(0.0, 0.0, 7.0), _baseline(0.0, 0.0, 7.0)
    _gradient(torch.randn(4, 3), cluster_T1, whole, gain_T, 1 / 4)
    for part in (slice(0, 1), slice(1, 4)):  # two micro-batches, each token of which counts as much in the step
        _gradient(torch.randn(4, 3)[part], cluster_T1[part], parts, gain_T[part], 1 / 4)
    for baseline in (whole, parts):
        baseline.finish_step(baseline.sum_2LG.clone())
        torch.testing.assert_close(baseline.mean_LG[1], torch.tensor([3.0, -4.0, 7.0]))
        assert not baseline.sum_2LG.any()
