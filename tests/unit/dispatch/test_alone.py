"""Dispatchers of a single rank, where every result can be computed by hand."""

import torch

from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.flat_dispatcher import FlatDispatcher
from moe_dist.dispatch.traffic_ledger import Stage, TrafficLedger
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import GroupKind, Mesh

EXPERTS = torch.tensor([[2, 0], [1, 2], [0, 1]])
GATES = torch.tensor([[0.5, 0.25], [2.0, 1.0], [4.0, 8.0]])


def _computed(keep_C: torch.Tensor | None) -> list[float]:
    """Tokens 1, 10 and 100; expert e multiplies by e + 1."""
    group = Mesh.alone().group(GroupKind.EXPERT_PARALLEL)
    dispatcher = FlatDispatcher(AllToAll(group, TrafficLedger(Links.alone()), 0, Stage.FLAT), 3)
    x_TD = torch.tensor([[1.0], [10.0], [100.0]])
    rows, metadata = dispatcher.dispatch(x_TD, EXPERTS, GATES, keep_C)
    factor_A = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(torch.tensor(rows.per_expert))
    result: list[float] = dispatcher.combine(rows.x_AD * factor_A[:, None], metadata)[:, 0].tolist()
    return result


def test_results_return_to_their_tokens_weighted_by_their_gates() -> None:
    assert _computed(None) == [1 * (0.5 * 3 + 0.25 * 1), 10 * (2 * 2 + 1 * 3), 100 * (4 * 1 + 8 * 2)]


def test_a_dropped_copy_counts_as_zero() -> None:
    keep_C = torch.tensor([True, False, False, True, True, True])
    assert _computed(keep_C) == [1 * 0.5 * 3, 10 * 1 * 3, 100 * (4 * 1 + 8 * 2)]
