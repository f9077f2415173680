"""Clustered layers under FSDP2: the training of one process, on any mesh, with clipping by the global norm."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_dist import ClusteredMoE, clip_grad_norm_, update_load_balance
from moe_dist.errors import ConfigError
from moe_dist.integrations.fsdp import shard_experts
from tests.distributed.drop_in import (
    CLIP,
    MOE,
    RATE,
    STEPS,
    WIDTH,
    SmallModel,
    assert_trained_alike,
    loss_of,
    losses_of_example,
    plain_training,
    weights_of,
)
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)


def _model(cluster: int) -> SmallModel:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // cluster, cluster), mesh_dim_names=("dp", "ep"))
    return SmallModel(lambda seed: ClusteredMoE(WIDTH, MOE, mesh=mesh, seed=seed, init_std=0.3))


def _trainings(clusters: tuple[int, ...], example: bool) -> tuple[list[Any], list[float]]:
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), []
    for cluster in clusters:
        model = _model(cluster)
        shard_experts(model)
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        losses = []
        for step in range(STEPS):
            loss = loss_of(model, step, rank, ranks)
            loss.backward()
            clip_grad_norm_(model, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            update_load_balance(model)
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / ranks)
        found.append((losses, weights_of(model)))
    return found, losses_of_example("fsdp_training.py") if example else []


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_mesh_trains_like_one_process(ranks: int) -> None:
    expected, clusters = plain_training(clip=True), (1, 2)
    for trainings, losses in run_ranks(_trainings, ranks, clusters, ranks == 2):
        for cluster, found in zip(clusters, trainings, strict=True):
            assert_trained_alike(found, expected, f"{ranks} ranks, ep={cluster}: ")
        assert not losses or losses[-1] < losses[0] - 0.3, "the example learns"


def test_what_cannot_work_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"call torch\.distributed\.init_process_group first"):
        shard_experts(ClusteredMoE(WIDTH, MOE))
