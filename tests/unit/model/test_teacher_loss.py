"""The divergence from a teacher, by hand and by an independent sum over outcomes."""

from math import log

import pytest
import torch
from torch import Tensor

from moe_dist.model.teacher_loss import TeacherTargets, kl_divergence, with_rest

DRAW = torch.Generator().manual_seed(0)
NO_LOSS = torch.zeros(1)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAW) * 3


def test_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/4), model (1/4, 1/4, 1/2): 1/2 log 2 + 1/4 log 1 + 1/4 log(1/2) = log(2) / 4."""
    teacher = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    logits = torch.tensor([[[0.25, 0.25, 0.5]]]).log() + 7
    assert float(kl_divergence(logits, TeacherTargets(teacher, None, NO_LOSS), 1.0)) == pytest.approx(log(2) / 4)
    # of the first token and the rest: (1/2, 1/2) to (1/4, 3/4), so 1/2 log 2 + 1/2 log(2/3)
    token = torch.tensor([[[0]]])
    stored = TeacherTargets(with_rest(teacher, token), token, NO_LOSS)
    assert float(kl_divergence(logits, stored, 1.0)) == pytest.approx((log(2) + log(2 / 3)) / 2)
    # at temperature 2 logits of 0, log 4 are (1/3, 2/3), and log 4, 0 are (2/3, 1/3)
    warm = (torch.tensor([[[0.0, log(4)]]]) / 2).log_softmax(-1)
    found = kl_divergence(torch.tensor([[[log(4), 0.0]]]), TeacherTargets(warm, None, NO_LOSS), 2.0)
    assert float(found) == pytest.approx(log(2) / 3)


@pytest.mark.parametrize("named", [1, 5, 12])
def test_the_rest_is_one_outcome(named: int) -> None:
    logits, teacher = _random(2, 3, 12).requires_grad_(), _random(2, 3, 12).log_softmax(-1)
    token = teacher.topk(named, dim=-1).indices
    found = kl_divergence(logits, TeacherTargets(with_rest(teacher, token), token, NO_LOSS), 1.0)
    p, q = teacher.double().exp(), logits.detach().double().softmax(-1)
    for b in range(2):
        for s in range(3):
            chosen = set(token[b, s].tolist())
            outcomes = [(float(p[b, s, v]), float(q[b, s, v])) for v in chosen]
            rest = [sum(float(x[b, s, v]) for v in range(12) if v not in chosen) for x in (p, q)]
            outcomes += [(rest[0], rest[1])] if named < 12 else []
            assert float(found[b, s].detach()) == pytest.approx(sum(x * log(x / y) for x, y in outcomes), rel=1e-4)
    whole = kl_divergence(logits, TeacherTargets(teacher, None, NO_LOSS), 1.0)
    assert bool((found <= whole + 1e-5).all())
    found.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    if named == 12:
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(logits.grad.double(), q - p, rtol=1e-4, atol=1e-6)
