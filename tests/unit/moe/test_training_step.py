"""Gradients and loads of a custom training loop, averaged over two ranks that have the same."""

import pytest
import torch
import torch.distributed as dist

from moe_dist.config import MoEConfig, WorldShape
from moe_dist.distributed.mesh import GroupKind, Mesh, RankGroup
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.training_step import average_gradients, update_load_balance

REPLICATED = (GroupKind.BASE_DATA, GroupKind.EXPERT_DATA)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> ClusteredMoE:
    """Layer on the first of two replicas: one all-reduce doubles what both have."""
    groups = {kind: RankGroup(kind, (0, 1) if kind in REPLICATED else (0,), None) for kind in GroupKind}
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor.mul_(2))
    moe = MoEConfig(experts=4, clusters=2, top_k=1, expert_hidden=8, rank=2, balance_rate=0.5)
    return ClusteredMoE(16, moe, mesh=Mesh(WorldShape(2, 1, 1), 0, groups))


def test_equal_gradients_of_every_class_stay_as_they_are(layer: ClusteredMoE) -> None:
    for number, parameter in enumerate(layer.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    unused = next(layer.parameters())
    unused.grad = None
    average_gradients(layer)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        expected = 0.0 if parameter is unused else number + 1.0
        assert parameter.grad is not None, name
        assert parameter.grad.unique().tolist() == [expected], (
            f"{name}: the mean of two equal gradients is each of them"
        )


def test_loads_of_both_ranks_move_the_biases_once(layer: ClusteredMoE) -> None:
    layer.balance.count(0, torch.tensor([0, 0, 0, 1]))
    layer.balance.drop(0, torch.tensor([False]))
    found = update_load_balance(layer)
    assert found["count_LE"].tolist() == [[6, 2, 0, 0]]
    assert found["dropped_L"].tolist() == [2]
    assert layer.balance.cluster_bias_LG.tolist() == [[-0.5, 0.5]]
    assert layer.balance.expert_bias_LE.tolist() == [[-0.5, 0.5, 0, 0]]
    assert not layer.balance.count_LE.any(), "counts start anew"
