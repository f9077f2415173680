"""What a run has measured so far and its summary needs: it outlives a resume, so that figures are of the whole run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_dist.metrics import flatten


@dataclass
class RunHistory:
    """Times and loads of every step, and the validation losses; a part of every checkpoint."""

    step_seconds: list[float] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    """Balance of each step, figures by name."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """`{step, tokens, loss}` of each evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Steps' figures as tensors, since there are many steps."""
        return {
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
            "loads": _table(self.loads),
            "load_names": [name for name, _ in flatten(self.loads[0])] if self.loads else [],
            "curve": self.curve,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from the figures of an earlier process."""
        self.step_seconds = state["step_seconds"].tolist()
        self.loads = [_nested(state["load_names"], row) for row in state["loads"].tolist()]
        self.curve = [dict(point) for point in state["curve"]]


def _table(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Float64 [rows, figures], the figures in the order in which `flatten` gives them."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.float64)
    return torch.tensor([[value for _, value in flatten(row)] for row in rows], dtype=torch.float64)


def _nested(names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """The tree of which `flatten` gave these dotted names and values."""
    tree: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree
