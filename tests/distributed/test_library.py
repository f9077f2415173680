"""Layers in a user's own training loop on several ranks: the same losses as on one, over any mesh."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moe_dist import ClusteredMoE, Mesh, MoEConfig, StandardMoE, TrafficLedger, average_gradients, update_load_balance
from moe_dist.distributed.links import Links
from moe_dist.errors import ConfigError
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)
WIDTH, BATCH = 16, 8
MOE = MoEConfig(experts=8, clusters=4, top_k=2, expert_hidden=16, rank=2, wire_dtype="float32")
STANDARD = MoEConfig(kind="standard", experts=8, top_k=2, expert_hidden=16, wire_dtype="float32")


class _Model(nn.Module):
    def __init__(self, moe: MoEConfig, mesh: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        kind = ClusteredMoE if moe.kind == "clustered" else StandardMoE
        self.layers = nn.ModuleList(kind(WIDTH, moe, mesh=mesh, seed=layer, init_std=0.2) for layer in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        h: Tensor = self.embed(x_BSD).transpose(0, 1)  # [S, B, D]: each column is a sequence
        for layer in self.layers:
            h = h + layer(h)
        return h.transpose(0, 1)


def _mesh(dims: dict[str, int] | None) -> Any:
    return None if dims is None else init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


def _losses(moe: MoEConfig, dims: dict[str, int] | None) -> list[float]:
    """Losses of a few steps of plain torch: backward, average_gradients, AdamW, update_load_balance."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = _Model(moe, _mesh(dims))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        x = torch.randn(BATCH, 5, WIDTH, generator=torch.Generator().manual_seed(step))
        mine = x[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
        loss = (model(mine) - mine.roll(1, dims=1)).square().mean()
        loss.backward()
        average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        update_load_balance(model)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


@pytest.mark.parametrize(
    "moe", [MOE, MOE.model_copy(update={"top_clusters": 2}), STANDARD], ids=["m1", "m2", "standard"]
)
def test_any_mesh_trains_like_one_rank(moe: MoEConfig) -> None:
    expected = run_ranks(_losses, 1, moe, None)[0]
    assert expected[-1] < expected[0]
    meshes: list[tuple[int, dict[str, int] | None]] = [
        (2, None),
        (2, {"ep": 2}),
        (4, {"dp": 2, "ep": 2}),
        (4, {"ep": 2, "dp": 2}),
        (4, {"cluster": 2, "shard": 2}),
    ]
    for ranks, dims in meshes:
        for losses in run_ranks(_losses, ranks, moe, dims):
            assert losses == pytest.approx(expected, rel=1e-5), dims


def _sliced() -> tuple[list[int], int]:
    """A layer over one dimension of a larger mesh: two independent pairs of ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "ep"))["ep"]
    ledger = TrafficLedger(Links.one_node(dist.get_rank(), 4))
    layer = ClusteredMoE(WIDTH, MOE, mesh=mesh, ledger=ledger)
    layer(torch.randn(5, 4, WIDTH)).sum().backward()
    return sorted({key.peer for key in ledger.sent}), ledger.total().bytes


def test_a_slice_of_a_device_mesh_keeps_traffic_among_its_ranks() -> None:
    found = run_ranks(_sliced, 4)
    assert [peers for peers, _ in found] == [[1], [0], [3], [2]]
    assert all(size > 0 for _, size in found)


def _refused(dims: dict[str, int]) -> str:
    with pytest.raises(ConfigError) as caught:
        ClusteredMoE(WIDTH, MoEConfig(experts=6, clusters=3, expert_hidden=16, rank=2), mesh=_mesh(dims))
    return str(caught.value)


def test_a_mesh_that_cannot_hold_the_clusters_is_refused_in_one_line() -> None:
    assert run_ranks(_refused, 2, {"ep": 2})[0] == "clusters=3 cannot be divided over a mesh of cluster=2"
    message = run_ranks(_refused, 4, {"cluster": 2, "ep": 2})[0]
    assert message.startswith("mesh_dim_names=('cluster', 'ep'): at most one of")


def test_a_single_process_needs_no_group() -> None:
    assert Mesh.alone().shape.ranks == 1
