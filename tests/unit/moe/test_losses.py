"""Router losses: their values on known cases, and what they push towards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.moe.router_losses import balance_loss, z_loss


def test_balance_loss_is_the_number_of_rows_when_even() -> None:
    even_RE = torch.eye(4) * 10
    assert float(balance_loss(even_RE, torch.arange(4)[:, None])) == pytest.approx(4)


def test_balance_loss_pushes_probability_away_from_the_crowded() -> None:
    logits_RE = torch.zeros(6, 4, requires_grad=True)
    balance_loss(logits_RE, torch.zeros(6, 1, dtype=torch.long)).backward()
    assert logits_RE.grad is not None
    assert bool((logits_RE.grad[:, 0] > 0).all())
    assert bool((logits_RE.grad[:, 1:] < 0).all())


@given(st.integers(0, 6), st.integers(1, 5), st.integers(0, 100))
def test_losses_are_their_formulas_and_zero_without_rows(rows: int, choices: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits_RE = torch.randn(rows, choices, generator=draw, requires_grad=True)
    index_RK = torch.randint(choices, (rows, 2), generator=draw)
    expected_z = sum(float(torch.logsumexp(row, 0)) ** 2 for row in logits_RE.detach())
    assert float(z_loss(logits_RE)) == pytest.approx(expected_z, rel=1e-5)
    probability_RE = logits_RE.detach().softmax(-1)
    counts = [int((index_RK == e).sum()) for e in range(choices)]
    expected = sum(counts[e] / (2 * rows) * float(probability_RE[:, e].mean()) for e in range(choices)) if rows else 0
    loss = balance_loss(logits_RE, index_RK)
    assert float(loss) == pytest.approx(rows * choices * expected, rel=1e-4, abs=1e-6)
    (loss + z_loss(logits_RE)).backward()
    assert logits_RE.grad is not None
    assert bool(logits_RE.grad.isfinite().all())
