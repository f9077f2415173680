"""Deferred updates of clusters without tokens change no bit: on any ranks, across all that needs the clusters."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.checkpoint.model_state import training_tensors_of
from moe_dist.config import WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.metrics.recorder import Recorder
from moe_dist.model.language_model import LanguageModel
from moe_dist.recluster.coordinator import Coordinator
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import SEQUENCES, SMALL, VOCABULARY
from tests.distributed.test_offload import RECLUSTER, TIGHT, _weights

pytestmark = pytest.mark.timeout(400)
SHUNNED: list[dict[int, list[int]]] = [{0: [1, 2, 3], 1: [0, 1]}, {0: [], 1: []}, {0: [0, 1, 2], 1: [2]}]
"""Clusters of each layer to which nothing is routed, one third of the steps each; the last are read while behind."""
STEPS = 12
COMMON = [*SMALL, *RECLUSTER, TIGHT, "moe.balance=none", "world.zero_stage=1", "optimizer.weight_decay=0.3"]


@dataclass
class Story:
    """What one rank saw of a run, and how often it deferred an update."""

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    state: dict[str, Tensor]
    weights: dict[str, Tensor]
    deferred: int = 0
    longest: int = 0


def _story(axes: tuple[int, int, int], words: list[str], directory: Path | None) -> Story:
    away = [] if directory is None else ["memory.offload=true", f"memory.directory={directory}"]
    config = load_config(None, [*COMMON, *words, *away])
    process = init_distributed(config.world)
    mesh, batch = Mesh.create(WorldShape(*axes), timedelta(seconds=60)), resolve_batch(config, process.ranks)
    memory = ExpertMemory(config, 4 // axes[1], process.rank, process.device) if away else None
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation, memory=memory)
    engine, coordinator = DeepSpeedEngine(model, config, batch, process), Coordinator(config, Recorder())
    coordinator.attach(engine)
    story, share = Story([], [], [], {}, {}), SEQUENCES // process.ranks
    for step in range(STEPS):
        data = torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        mine = data[process.rank * share : (process.rank + 1) * share]
        bias_LG = model.context.balance.cluster_bias_LG.zero_()
        for layer, clusters in SHUNNED[3 * step // STEPS].items():
            bias_LG[layer, clusters] = -1e9
        outcome = engine.forward_backward(mine)
        story.losses.append(outcome.loss)
        story.norms.append(engine.update(outcome, 1e-3 * (step + 1)))
        if step == 2:  # while clusters are behind
            coordinator.executor.exchange([(0, (0, 5)), (1, (2, 13))], mine)
        if step == 3:
            bias_LG.zero_()
            story.evaluations.append(_evaluate(model, mine))
    optimizer = engine._offloaded
    if optimizer is not None:
        story.deferred, story.longest = optimizer.deferred, optimizer.longest
    tensors = training_tensors_of(model, engine.training_state())
    story.state = {f"{n} {s.start}": s.values.clone() for n, t in tensors.items() for s in t.shards}
    story.weights = _weights(model)
    if memory is not None:
        memory.close()
    return story


def _evaluate(model: LanguageModel, sequences_BS: Tensor) -> float:
    with model.evaluating():
        loss = model(sequences_BS).double()
    dist.all_reduce(loss)
    return float(loss)


def _lazy_and_eager(axes: tuple[int, int, int], words: list[str], directory: Path) -> list[Story]:
    return [
        _story(axes, words, None),
        _story(axes, [*words, "memory.lazy_updates=false"], directory),
        _story(axes, words, directory),
    ]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((1, 1, 1), ["world.zero_stage=1"]),
        ((1, 1, 1), ["model.activation_checkpointing=true", "memory.device_budget_bytes=120000"]),
        ((1, 2, 1), []),
        ((2, 1, 1), []),
        ((1, 1, 2), []),
    ],
    ids=str,
)
def test_deferred_updates_change_no_bit(axes: tuple[int, int, int], words: list[str], tmp_path: Path) -> None:
    ranks = axes[0] * axes[1] * axes[2]
    for in_memory, eager, lazy in run_ranks(_lazy_and_eager, ranks, axes, words, tmp_path, timeout=300):
        assert eager.deferred == 0 < lazy.deferred
        assert lazy.longest >= STEPS // 3
        for other in (in_memory, eager):
            _assert_same(lazy, other, state=ranks == 1 or other is eager)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 1, 1)], ids=str)
def test_deferred_updates_change_no_bit_in_bfloat16(axes: tuple[int, int, int], tmp_path: Path) -> None:
    words = ["train.precision=bfloat16", "memory.device_budget_bytes=120000"]
    for _, eager, lazy in run_ranks(_lazy_and_eager, axes[0], axes, words, tmp_path, timeout=300):
        assert eager.deferred == 0 < lazy.deferred
        _assert_same(lazy, eager)


def _assert_same(one: Story, other: Story, state: bool = True) -> None:
    assert one.losses == other.losses
    assert one.norms == other.norms
    assert one.evaluations == other.evaluations
    for name in ("weights", *(["state"] if state else [])):
        a, b = getattr(one, name), getattr(other, name)
        assert a.keys() == b.keys()
        assert not [key for key in a if not torch.equal(a[key], b[key])], name


def _moved(words: list[str], directory: Path) -> tuple[int, list[int]]:
    """Bytes that the fourth step moves while one cluster of each layer is active, and how far each is behind."""
    config = load_config(None, [*COMMON, *words, "memory.offload=true", f"memory.directory={directory}"])
    process = init_distributed(config.world)
    mesh, batch = Mesh.create(WorldShape(1, 1, 1), timedelta(seconds=60)), resolve_batch(config, 1)
    memory = ExpertMemory(config, 4, 0, process.device)
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation, memory=memory)
    engine = DeepSpeedEngine(model, config, batch, process)
    model.context.balance.cluster_bias_LG[:, 1:] = -1e9
    before = 0
    for step in range(4):
        before = memory.device.bytes_in + memory.device.bytes_out
        data = torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        engine.update(engine.forward_backward(data), 1e-3)
    moved = memory.device.bytes_in + memory.device.bytes_out - before
    behind = sorted(cluster.behind for cluster in memory.clusters.values())
    memory.close()
    return moved, behind


def test_what_is_inactive_is_not_brought_up(tmp_path: Path) -> None:
    """Both active clusters fit into the budget, so that nothing moves at all."""
    words = [*SMALL, "memory.device_budget_bytes=110000"]
    assert run_ranks(_moved, 1, words, tmp_path) == [(0, [0, 0, 4, 4, 4, 4, 4, 4])]
    ((moved, behind),) = run_ranks(_moved, 1, [*words, "memory.lazy_updates=false"], tmp_path)
    assert moved > 8 * 3 * 12_032
    assert behind == [0] * 8
