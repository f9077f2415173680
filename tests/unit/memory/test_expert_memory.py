"""Memory of offloaded experts: which clusters are prefetched, which are evicted, and whose rows are counted."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dist.config import load_config
from moe_dist.memory.block import Block, TensorKind
from moe_dist.memory.eviction import COLD, DECAY, Activity
from moe_dist.memory.expert_memory import ExpertMemory

CPU = torch.device("cpu")
Place = tuple[int, int]
Make = Callable[..., ExpertMemory]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Two layers of three clusters, each one matrix of 4 x 16: 256 bytes a block."""
    memories: list[ExpertMemory] = []

    def build(*words: str) -> ExpertMemory:
        sizes = ["model.layers=2", "memory.offload=true", f"memory.directory={tmp_path / str(len(memories))}"]
        memory = ExpertMemory(load_config(None, [*sizes, "train.precision=float32", *words]), 3, 0, CPU)
        memories.append(memory)
        for layer in range(2):
            for local in range(3):
                memory.adopt(layer, local, {"matrix": nn.Parameter(torch.full((4, 16), 10.0 * layer + local))})
        return memory

    yield build
    for memory in memories:
        memory.close()


def _places(blocks: Sequence[Block]) -> list[tuple[Place, TensorKind]]:
    return [((block.layer, block.local), block.kind) for block in blocks]


def test_the_next_clusters_are_those_of_the_order_of_use(make: Make) -> None:
    memory = make("memory.prefetch=2")
    following = {
        place: [[(other.layer, other.local) for other in memory.next_clusters(cluster, step)] for step in (1, -1)]
        for place, cluster in memory.clusters.items()
    }
    assert following[0, 1] == [[(0, 2), (1, 0)], [(0, 0)]], "forward: the layer's next, then the next layer's first"
    assert following[1, 1] == [[(1, 2)], [(1, 0), (0, 2)]], "backward: the layer's one before, then the layer before"
    assert following[0, 0] == [[(0, 1), (0, 2)], []]
    assert following[1, 2] == [[], [(1, 1), (1, 0)]]


def test_a_forward_pass_prefetches_what_follows_and_a_backward_pass_what_came_before(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make("memory.prefetch=1")
    asked: list[tuple[Place, TensorKind, bool]] = []

    def prefetch(blocks: Sequence[Block], *, zero_init: bool = False) -> None:
        asked.extend((place, kind, zero_init) for place, kind in _places(blocks))

    monkeypatch.setattr(memory.device, "prefetch", prefetch)
    x = torch.zeros(1, 4, requires_grad=True)
    for place in ((0, 0), (0, 1)):
        cluster = memory.clusters[place]
        x = cluster.run(lambda x, part=cluster.parameters: x @ part["matrix"][:, :4], 1, x)
    assert asked == [((0, 1), TensorKind.WEIGHT, False), ((0, 2), TensorKind.WEIGHT, False)]
    asked.clear()
    x.sum().backward()
    assert asked == [((0, 0), TensorKind.WEIGHT, False), ((0, 0), TensorKind.GRADIENT, True)], (
        "the backward pass of cluster 1 prefetches cluster 0, whose gradient starts from zeros"
    )


def test_every_forward_pass_counts_its_cluster_s_rows(make: Make) -> None:
    memory = make()
    rows = {0: 8, 1: 1, 2: 8}
    for local, number in rows.items():
        cluster = memory.clusters[0, local]
        cluster.run(lambda x: x + 0.0, number, torch.zeros(number, 1, requires_grad=True))
    cold = [memory.activity.is_cold(0, local) for local in range(3)]
    assert cold == [False, True, False], "1 of 17 rows is less than a quarter of a third"
    for place in ((1, 0), (1, 1)):
        memory.clusters[place].run(lambda x: x + 0.0, 5, torch.zeros(5, 1, requires_grad=True))
    for _ in range(30):
        memory.clusters[1, 0].skip()
    assert memory.activity.is_cold(1, 0), "a pass without rows counts too"
    with torch.no_grad():
        for _ in range(40):
            memory.clusters[0, 1].run(lambda x: x, 99, torch.zeros(99, 1))
    memory.recomputing = True
    memory.forward_begins(memory.clusters[0, 1], 99)
    assert memory.activity.is_cold(0, 1), "rows of an evaluation and of a recomputation are not counted"


def test_the_block_of_a_cold_cluster_is_evicted_before_an_older_one(make: Make) -> None:
    memory = make("memory.prefetch=0", f"memory.device_budget_bytes={5 * 256}")
    device, blocks = memory.device, [memory.clusters[0, local].block(TensorKind.WEIGHT) for local in range(3)]
    for local, rows in ((0, 8), (2, 8), (1, 1)):
        memory.forward_begins(memory.clusters[0, local], rows)
        with device.pinned(blocks[local]):
            pass
    others = [memory.clusters[1, local].block(TensorKind.WEIGHT) for local in range(3)]
    assert all(device.holds(block) for block in blocks)
    for other in others:
        device.acquire(other)
    held = [device.holds(block) for block in blocks]
    assert held == [True, False, True], "five blocks have room; the cold cluster 1 goes, though it was used last"


def test_rows_are_averaged_over_passes() -> None:
    activity = Activity(1, 2)
    activity.note(0, 0, 100)
    activity.note(0, 1, 100)
    assert (DECAY, COLD) == (0.9, 0.25)
    for passes in range(1, 21):  # 10 rows of each at first; the second cluster gets no more, the first 100 a pass
        activity.note(0, 0, 100)
        activity.note(0, 1, 0)
        first, second = 100 * (1 - 0.9 ** (passes + 1)), 10 * 0.9**passes
        assert activity.is_cold(0, 1) is (2 * second < 0.25 * (first + second)), passes
        assert not activity.is_cold(0, 0)


def test_the_gradient_of_the_last_micro_batch_alone_is_complete(make: Make) -> None:
    memory, finished = make(), []

    def on_gradient(cluster: Any, gradient: Tensor) -> None:
        finished.append((cluster.local, gradient.clone()))

    memory.on_gradient = on_gradient
    cluster = memory.clusters[0, 1]
    for memory.last_pass in (False, True):
        x = torch.ones(2, 4, requires_grad=True)
        cluster.run(lambda x: x @ cluster.parameters["matrix"], 2, x).sum().backward()
    ((local, gradient),) = finished
    assert local == 1
    assert gradient[:64].tolist() == [4.0] * 64, "two rows of ones in each of two micro-batches"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_runs_of_elements_are_read_and_written_where_they_are(make: Make, precision: str) -> None:
    memory = make(f"train.precision={precision}")
    cluster = memory.clusters[1, 2]
    memory.write_run(cluster, "matrix", memory.kind_of("master"), 3, torch.tensor([5.0, 6.0]))
    found = memory.read_run(cluster, "matrix", memory.kind_of("master"), 2, 4)
    assert found.tolist() == [12.0, 5.0, 6.0, 12.0]
    weight = memory.read_run(cluster, "matrix", TensorKind.WEIGHT, 3, 1)
    assert weight.item() == (5 if precision == "float32" else 12), "bfloat16 weights have masters of their own"


def test_the_least_budget_is_a_backward_pass_or_an_update(make: Make) -> None:
    memory = make()
    cluster = memory.clusters[0, 0]
    assert memory.least_budget(cluster) == 4 * 256, "an update needs weight, gradient and two moments"
    assert memory.least_host_budget(cluster) == 5 * 256
    memory.recomputes = True
    assert memory.least_budget(cluster) == 4 * 256, "three clusters' weights and a gradient"
