"""What a routing decision needs of ranks and nodes, on a case one can count by hand."""

import torch

from moe_dist.dispatch.routing_trace import RoutingTrace
from moe_dist.dispatch.traffic_ledger import Stage

CHOICE = torch.tensor([[0, 1], [1, 6], [6, 7], [-1, 3]])
HOME = CHOICE // 2  # four ranks of two experts each


def _seen(stage: Stage, keep: int = 0) -> RoutingTrace:
    observed = RoutingTrace(rank=0, node_of_rank=(0, 0, 1, 1), keep=keep)
    observed.see(2, stage, (0, 1, 2, 3), CHOICE, HOME)
    return observed


def test_a_row_is_needed_once_by_a_rank_but_flat_sends_every_copy() -> None:
    flat, one = (_seen(stage).needs[2, stage] for stage in (Stage.FLAT, Stage.ONE))
    assert flat.moved_P.tolist() == [3, 1, 0, 3]
    assert one.moved_P.tolist() == flat.needed_P.tolist() == one.needed_P.tolist() == [2, 1, 0, 2]


def test_another_node_needs_a_row_once_and_counts_add_up() -> None:
    observed = _seen(Stage.ONE)
    assert observed.needs[2, Stage.ONE].nodes == 2  # the second and the third row, on node 1
    observed.see(2, Stage.ONE, (0, 1, 2, 3), CHOICE, HOME)
    assert observed.needs[2, Stage.ONE].nodes == 4
    assert observed.needs[2, Stage.ONE].needed_P.tolist() == [4, 2, 0, 4]


def test_the_first_choices_are_kept() -> None:
    observed = _seen(Stage.FLAT, keep=6)
    observed.see(2, Stage.FLAT, (0, 1, 2, 3), CHOICE, HOME)
    kept = torch.cat(observed.choices[2, Stage.FLAT])
    assert torch.equal(kept, torch.cat([CHOICE, CHOICE[:2]]))


def test_an_absent_choice_is_needed_nowhere_whatever_its_owner() -> None:
    observed = RoutingTrace(rank=0, node_of_rank=(0, 0, 1, 1))
    observed.see(0, Stage.ONE, (0, 1, 2, 3), torch.tensor([[-1, 3]]), torch.tensor([[2, 1]]))
    assert observed.needs[0, Stage.ONE].moved_P.tolist() == [0, 1, 0, 0]
    assert observed.needs[0, Stage.ONE].nodes == 0
