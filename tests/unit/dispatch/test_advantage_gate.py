"""The gate of a single cluster: its value, and a gradient that knows better from larger."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.dispatch.advantage_gate import advantage, advantage_gate


def _gradient(logits_TG: Tensor, cluster_T1: Tensor, sequences: int, gain_T: Tensor) -> Tensor:
    """Of sum_t gain_t * gate_t, where a token's output is its gain over two halves."""
    logits_TG = logits_TG.clone().requires_grad_()
    y_TD = (gain_T[:, None] / torch.tensor([1.0, 2.0])).requires_grad_()
    gated_TD = advantage_gate(y_TD, logits_TG, cluster_T1, sequences)
    assert torch.equal(gated_TD, y_TD)
    (gated_TD * torch.tensor([0.5, 1.0])).sum().backward()
    assert logits_TG.grad is not None
    assert y_TD.grad is not None
    assert torch.equal(y_TD.grad, torch.tensor([0.5, 1.0]).expand_as(y_TD))
    return logits_TG.grad


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4))
def test_it_is_the_gradient_of_the_log_probability_times_the_advantage(
    seed: int, length: int, sequences: int, clusters: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    tokens = length * sequences
    logits_TG, gain_T = torch.randn(tokens, clusters, generator=draw), torch.randn(tokens, generator=draw)
    cluster_T1 = torch.randint(clusters, (tokens, 1), generator=draw)
    better_T = []
    for t in range(tokens):
        peers = [u for u in range(tokens) if u % sequences == t % sequences and cluster_T1[u] == cluster_T1[t]]
        better_T.append(gain_T[t] - gain_T[peers].mean())
    plain_TG = logits_TG.clone().requires_grad_()
    (torch.stack(better_T) * plain_TG.log_softmax(1).gather(1, cluster_T1)[:, 0]).sum().backward()
    torch.testing.assert_close(_gradient(logits_TG, cluster_T1, sequences, gain_T), plain_TG.grad, rtol=1e-4, atol=1e-5)


def test_what_all_tokens_of_a_cluster_gain_moves_no_logit() -> None:
    cluster_T1 = torch.tensor([[0], [0], [1]])
    grad_TG = _gradient(torch.randn(3, 2), cluster_T1, 1, torch.tensor([-2.0, -2.0, 5.0]))
    torch.testing.assert_close(grad_TG, torch.zeros(3, 2))


def test_a_token_that_gains_more_than_its_peers_raises_its_cluster() -> None:
    grad_TG = _gradient(torch.zeros(2, 2), torch.tensor([[0], [0]]), 1, torch.tensor([-3.0, -1.0]))
    assert grad_TG[0, 0] < 0 < grad_TG[0, 1], "descent raises the logit of the cluster that served it well"
    assert grad_TG[1, 0] > 0 > grad_TG[1, 1]


@given(st.integers(0, 1000))
def test_dividing_a_batch_between_sequences_changes_nothing(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    grad_SB, cluster_SB = torch.randn(5, 4, generator=draw), torch.randint(3, (5, 4), generator=draw)
    whole_SB = advantage(grad_SB.flatten(), cluster_SB.flatten(), 3, 4).view(5, 4)
    for part in (slice(0, 1), slice(1, 4)):
        grad, cluster = grad_SB[:, part], cluster_SB[:, part]
        alone = advantage(grad.flatten(), cluster.flatten(), 3, grad.shape[1])
        assert torch.equal(alone.view_as(grad), whole_SB[:, part])
