"""Scores of experts by which they are chosen, and the logarithms that their gates are made of."""

from typing import NamedTuple, Self

from torch import Tensor
from torch.nn import functional

from moe_dist.config import MoEConfig


class Scoring(NamedTuple):
    """Function from router logits to scores, and the groups that a token chooses first.

    Attributes:
        sigmoid: True if scores are sigmoids of logits, as in DeepSeek-V3; False: the logits.
        groups, top_groups: number of groups of neighboring experts, and of those that a token chooses.
    """

    sigmoid: bool = False
    groups: int = 1
    top_groups: int = 1

    @classmethod
    def of(cls, moe: MoEConfig) -> Self:
        """Return the scoring of a configuration."""
        return cls(moe.score == "sigmoid", moe.groups, moe.top_groups)

    def selection(self, logits: Tensor, bias: Tensor) -> Tensor:
        """Return the scores whose largest are chosen, without gradient."""
        logits = logits.detach()
        return (logits.sigmoid() if self.sigmoid else logits) + bias

    def log_gates(self, logits: Tensor) -> Tensor:
        """Return the logarithms over some of which gates are a softmax: sigmoids are then divided by their sum."""
        return functional.logsigmoid(logits) if self.sigmoid else logits


PLAIN = Scoring()
"""Scores that are logits, without groups."""
