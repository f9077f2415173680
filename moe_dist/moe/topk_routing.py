"""Standard top-k routing over all E experts; a selection bias affects the choice but not the gates.

Shapes: T tokens, E experts, K chosen experts.
"""

from typing import NamedTuple

from torch import Tensor


class FlatChoice(NamedTuple):
    """Chosen experts of each token and their gates."""

    expert_TK: Tensor
    gate_TK: Tensor


def choose_flat(logits_TE: Tensor, bias_E: Tensor, top_k: int, normalize: bool = True) -> FlatChoice:
    """Choose the `top_k` largest of logit + bias.

    Gates are a softmax over the chosen logits, as in Mixtral; without `normalize`, and for k=1, over all logits.
    """
    expert_TK = (logits_TE.detach() + bias_E).topk(top_k, dim=-1).indices
    if top_k == 1 or not normalize:  # a softmax over one logit has no gradient
        return FlatChoice(expert_TK, logits_TE.softmax(dim=-1).gather(-1, expert_TK))
    return FlatChoice(expert_TK, logits_TE.gather(-1, expert_TK).softmax(dim=-1))
