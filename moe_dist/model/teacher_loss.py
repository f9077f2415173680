"""Divergence of a model's next-token distribution from that of a teacher.

Shapes: B sequences, S tokens, V tokens of the vocabulary, K tokens that a teacher's stored logits name.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_LEAST = -1e30
"""Stand-in for the logarithm of 0, whose product with a probability of 0 is 0."""


class TeacherTargets(NamedTuple):
    """Teacher's distribution of the token after each one of some sequences, at the temperature of `distill`.

    Attributes:
        log_prob_BSK: log-probabilities of all tokens, or of the `token_BSK` and, last, of all others together.
        token_BSK: the likeliest tokens; None: all are in `log_prob_BSK`, in the order of their ids.
        loss_B: teacher's own next-token loss of each sequence, summed over its targets, nats.
    """

    log_prob_BSK: Tensor
    token_BSK: Tensor | None
    loss_B: Tensor


def kl_divergence(logits_BSV: Tensor, teacher: TeacherTargets, temperature: float) -> Tensor:
    """Return KL(teacher || model) for each token [B, S], nats, both at a temperature.

    Where the teacher names K tokens, all others are one outcome on both sides: a lower bound of the divergence over the
    whole vocabulary, and equal to it where K is all of it.
    """
    log_prob_BSV = functional.log_softmax(logits_BSV.float() / temperature, dim=-1)
    if teacher.token_BSK is not None:
        log_prob_BSV = with_rest(log_prob_BSV, teacher.token_BSK)
    expected = teacher.log_prob_BSK.float().clamp_min(_LEAST)
    return functional.kl_div(log_prob_BSV, expected, reduction="none", log_target=True).sum(dim=-1)


def with_rest(log_prob_BSV: Tensor, token_BSK: Tensor) -> Tensor:
    """Return the log-probabilities of some tokens, and of all others together, [B, S, K + 1].

    The rest is a sum over the others, not one minus the named ones, which would lose all digits where it is small.
    """
    others_BSV = log_prob_BSV.scatter(-1, token_BSK, _LEAST)
    rest_BS1 = torch.logsumexp(others_BSV, dim=-1, keepdim=True)
    return torch.cat([log_prob_BSV.gather(-1, token_BSK), rest_BS1], dim=-1)
