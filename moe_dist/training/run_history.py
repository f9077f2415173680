"""Measurements of a run for its summary, kept in checkpoints so that they cover the whole run after a resume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_dist.metrics import flatten


@dataclass
class RunHistory:
    """Times and load statistics of every step, and all validation losses."""

    step_seconds: list[float] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    """Load statistics of each step, by name."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Validation loss of each evaluation, `{step, tokens, loss}`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the history, with the figures of steps as tensors because there are many."""
        return {
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
            "loads": _as_table(self.loads),
            "load_names": [name for name, _ in flatten(self.loads[0])] if self.loads else [],
            "curve": self.curve,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore the history of an earlier process."""
        self.step_seconds = state["step_seconds"].tolist()
        self.loads = [_unflatten(state["load_names"], row) for row in state["loads"].tolist()]
        self.curve = [dict(point) for point in state["curve"]]


def _as_table(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return a float64 table [rows, figures], with figures in the order of `flatten`."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.float64)
    return torch.tensor([[value for _, value in flatten(row)] for row in rows], dtype=torch.float64)


def _unflatten(names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """Return the nested dictionary whose `flatten` has these dotted names and values."""
    tree: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree
