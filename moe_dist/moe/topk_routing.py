"""Standard top-k routing over all E experts; a selection bias affects the choice but not the gates.

Shapes: T tokens, E experts, K chosen experts, G groups of N neighboring experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.moe.scoring import PLAIN, Scoring


class FlatChoice(NamedTuple):
    """Chosen experts of each token and their gates."""

    expert_TK: Tensor
    gate_TK: Tensor


def choose_flat(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, normalize: bool = True, scoring: Scoring = PLAIN
) -> FlatChoice:
    """Choose the `top_k` largest of score + bias, in the best groups if there are several.

    Gates are a softmax over the chosen logits, as in Mixtral; without `normalize`, and for k=1, over all logits. Those
    of sigmoids are the sigmoids, divided by their sum with `normalize`.
    """
    score_TE = scoring.selection(logits_TE, bias_E)
    if scoring.groups > 1:
        score_TE = _within_groups(score_TE, scoring)
    expert_TK = score_TE.topk(top_k, dim=-1).indices
    if top_k > 1 and normalize:  # a softmax over one logit has no gradient
        return FlatChoice(expert_TK, scoring.log_gates(logits_TE).gather(-1, expert_TK).softmax(dim=-1))
    gate_TE = logits_TE.sigmoid() if scoring.sigmoid else logits_TE.softmax(dim=-1)
    return FlatChoice(expert_TK, gate_TE.gather(-1, expert_TK))


def _within_groups(score_TE: Tensor, scoring: Scoring) -> Tensor:
    """Return the scores with those outside of each token's best groups at minus infinity.

    A group's score is its largest (DeepSeek-V2), or with sigmoids the sum of its two largest (DeepSeek-V3).
    """
    score_TGN = score_TE.unflatten(-1, (scoring.groups, -1))
    score_TG = score_TGN.topk(2 if scoring.sigmoid else 1, dim=-1).values.sum(-1)
    chosen_TG = score_TG.topk(scoring.top_groups, dim=-1).indices
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(-1, chosen_TG, True)
    within: Tensor = score_TGN.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(-2)
    return within
