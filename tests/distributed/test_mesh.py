"""Process groups: the same order on all ranks, and each joins the ranks it says."""

from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_dist.config import WorldShape
from moe_dist.distributed.links import LinkKind, Links
from moe_dist.distributed.mesh import GroupKind, Mesh, coordinates_of, group_layout, rank_at
from moe_dist.model.megatron_backbone import expert_parallel_ranks, initialize_megatron
from tests.distributed.ranks import run_ranks

SHAPES = [(1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (4, 1, 1)]


def _sums_over_groups(shape: WorldShape) -> tuple[list[tuple[int, ...]], dict[str, float]]:
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        mesh = Mesh.create(shape, timedelta(seconds=60))
    created = [tuple(call.args[0]) for call in new_group.call_args_list]
    sums = {}
    for kind in mesh.groups:
        value = torch.tensor(float(2 ** dist.get_rank()))
        dist.all_reduce(value, group=mesh.group(kind).handle)
        sums[kind.value] = float(value)
    return created, sums


@pytest.mark.parametrize("axes", [*SHAPES, (1, 4, 1, 1, 2, 2)])
def test_groups_are_created_alike_and_join_their_ranks(axes: tuple[Any, ...]) -> None:
    shape = WorldShape(*axes)
    outcomes = run_ranks(_sums_over_groups, shape.ranks, shape)
    layout = group_layout(shape)
    for rank, (created, sums) in enumerate(outcomes):
        assert created == [ranks for _, ranks in layout]
        assert set(sums) == {kind.value for kind, _ in layout}
        for kind in {kind for kind, _ in layout}:
            (mine,) = [ranks for k, ranks in layout if k is kind and rank in ranks]
            assert sums[kind.value] == sum(2**r for r in mine)


def test_attention_divides_neighbors_whatever_the_experts_do() -> None:
    layout = group_layout(WorldShape(2, 2, 2, tensor=2, context=2))
    groups = {kind: [ranks for other, ranks in layout if other is kind] for kind in GroupKind}
    assert groups[GroupKind.TENSOR] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups[GroupKind.CONTEXT] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups[GroupKind.SEQUENCE] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups[GroupKind.TENSOR_DATA] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert not {GroupKind.TENSOR, GroupKind.SEQUENCE} & {kind for kind, _ in group_layout(WorldShape(2, 2, 2))}


def _expert_groups(shape: WorldShape) -> tuple[list[tuple[int, ...]], tuple[tuple[int, ...], ...]]:
    initialize_megatron(60, shape.cluster * shape.shard)
    mesh = Mesh.create(shape, timedelta(seconds=60))
    own = [mesh.group(kind).ranks for kind in (GroupKind.EXPERT_PARALLEL, GroupKind.EXPERT_DATA)]
    return own, expert_parallel_ranks()


@pytest.mark.parametrize("axes", SHAPES)
def test_megatron_knows_the_same_expert_groups(axes: tuple[int, int, int]) -> None:
    shape = WorldShape(*axes)
    for own, megatrons in run_ranks(_expert_groups, shape.ranks, shape):
        assert own == list(megatrons)


@pytest.mark.parametrize("axes", SHAPES)
def test_coordinates_and_sizes(axes: tuple[int, int, int]) -> None:
    shape = WorldShape(*axes)
    sizes = {
        GroupKind.STAGE_ONE: shape.cluster,
        GroupKind.CLUSTER: shape.shard,
        GroupKind.EXPERT_PARALLEL: shape.cluster * shape.shard,
        GroupKind.BASE_DATA: shape.data * shape.shard,
        GroupKind.EXPERT_DATA: shape.data,
    }
    assert [rank_at(shape, coordinates_of(shape, rank)) for rank in range(shape.ranks)] == list(range(shape.ranks))
    for kind, size in sizes.items():
        groups = [ranks for k, ranks in group_layout(shape) if k is kind]
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(shape.ranks))
        assert {len(ranks) for ranks in groups} == {size}
    clusters = [ranks for k, ranks in group_layout(shape) if k is GroupKind.CLUSTER]
    assert all(ranks == tuple(range(ranks[0], ranks[0] + len(ranks))) for ranks in clusters), "neighbours share a node"


def _links() -> tuple[int, ...]:
    return Links.discover(torch.device("cpu")).node_of_rank


def test_ranks_of_one_host_are_one_node() -> None:
    assert run_ranks(_links, 2) == [(0, 0), (0, 0)]


def test_link_kinds() -> None:
    links = Links(rank=1, node_of_rank=(0, 0, 1))
    assert [links.kind(peer) for peer in range(3)] == [LinkKind.INTRA_NODE, LinkKind.SELF, LinkKind.INTER_NODE]
