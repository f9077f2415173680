"""Experts kept in tiers train to the last bit as experts in memory do, wherever they are and whoever moves them."""

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_dist.config import WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.errors import ConfigError, MoeDistError, OffloadError
from moe_dist.memory.block import TensorKind
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.metrics.recorder import Recorder
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.quantized_experts import stored_sizes
from moe_dist.recluster.coordinator import Coordinator
from moe_dist.recluster.migration_executor import Move
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import SEQUENCES, SMALL, VOCABULARY
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(400)
STEPS = 20
REGROUPED: dict[int, list[Move]] = {6: [(0, (0, 5)), (0, (1, 6, 11)), (1, (2, 13))], 13: [(1, (0, 5)), (0, (0, 9))]}
RECLUSTER = ["recluster.period=2", "recluster.start=1", "recluster.max_loss_increase=1e9"]
BLOCKS = {2: [(1, 0, 0, 1), (0, 0, 1, 1)], 1: [(0, 0, 0, 0), (0, 0, 0, 0)]}
TIGHT = "memory.device_budget_bytes=80000"
BLOCK = 12_032
"""Bytes of each block of a cluster of these; of weights in bfloat16 half as much."""


@dataclass
class Story:
    """What a rank saw of a run."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    moved: int


def _story(axes: tuple[int, int, int], words: list[str], steps: int, directory: Path | None) -> Story:
    offload = [] if directory is None else ["memory.offload=true", f"memory.directory={directory}"]
    config = load_config(None, [*SMALL, *RECLUSTER, *words, *offload])
    process = init_distributed(config.world)
    mesh, batch = Mesh.create(WorldShape(*axes), timedelta(seconds=60)), resolve_batch(config, process.ranks)
    memory = None
    if directory is not None:
        memory = ExpertMemory(config, config.moe.clusters // axes[1], process.rank, process.device)
    links = Links.discover(process.device)
    model = LanguageModel(config, VOCABULARY, mesh, links, batch.accumulation, memory=memory)
    engine = DeepSpeedEngine(model, config, batch, process)
    coordinator, losses, norms = Coordinator(config, Recorder()), [], []
    coordinator.attach(engine)
    share = SEQUENCES // process.ranks
    for step in range(steps):
        data = torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        mine = data[process.rank * share : (process.rank + 1) * share]
        outcome = engine.forward_backward(mine)
        losses.append(outcome.loss)
        norms.append(engine.update(outcome, 1e-3))
        if step in REGROUPED:
            if config.recluster.transition == "refit":
                coordinator.executor.refit(REGROUPED[step], mine, mine[:1])
            else:
                coordinator.executor.exchange(REGROUPED[step], mine)
            coordinator.executor.relocate(BLOCKS[axes[1]])
    story = Story(losses, norms, _weights(model), 0 if memory is None else memory.tiers.figures()["bytes_in"])
    engine.close()
    if memory is not None:
        assert memory.tiers.budget - memory.tiers.figures()["peak_device_bytes"] < BLOCK, "the budget was never needed"
        memory.close()
    return story


def _weights(model: LanguageModel) -> dict[str, Tensor]:
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, ClusteredExperts):
            with module.present():
                weights.update({f"{name}.{leaf}": p.detach().clone() for leaf, p in module.named_parameters()})
    dense = {name: p.detach().clone() for name, p in model.named_parameters() if ".clusters." not in name}
    return {**dense, **weights}


def _both(axes: tuple[int, int, int], variants: list[list[str]], steps: int, directory: Path) -> list[list[Story]]:
    return [[_story(axes, words, steps, where) for where in (None, directory)] for words in variants]


def _assert_same(stories: list[list[Story]]) -> None:
    for in_memory, offloaded in stories:
        assert offloaded.losses == in_memory.losses
        assert offloaded.norms == in_memory.norms
        assert offloaded.weights.keys() == in_memory.weights.keys()
        different = [
            name for name, value in in_memory.weights.items() if not torch.equal(offloaded.weights[name], value)
        ]
        assert not different
        assert offloaded.moved > 0


def test_twenty_steps_with_reclusterings_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    variants = [[TIGHT, "world.zero_stage=1", "moe.top_clusters=2"]]
    for stories in run_ranks(_both, 1, (1, 1, 1), variants, STEPS, tmp_path, timeout=300):
        _assert_same(stories)


def test_every_stage_precision_and_pass_is_the_same(tmp_path: Path) -> None:
    variants = [
        [TIGHT, "world.zero_stage=0", "optimizer.clip_norm=0", "train.micro_batch_size=8"],
        ["memory.device_budget_bytes=120000", "world.zero_stage=2", "model.activation_checkpointing=true"],
        [
            "memory.device_budget_bytes=120000",
            "memory.prefetch=0",
            "train.precision=bfloat16",
            "train.micro_batch_size=8",
        ],
    ]
    for stories in run_ranks(_both, 1, (1, 1, 1), variants, 4, tmp_path, timeout=300):
        _assert_same(stories)


@pytest.mark.parametrize("axes", [(1, 2, 1), (2, 1, 1)])
def test_ranks_that_share_or_repeat_experts_are_the_same(axes: tuple[int, int, int], tmp_path: Path) -> None:
    """Clusters and experts move between ranks after a step; replicas add up their gradients."""
    for stories in run_ranks(_both, 2, axes, [[TIGHT, "world.zero_stage=1"]], 9, tmp_path, timeout=300):
        _assert_same(stories)


def _bytes_by_kind(residuals: list[str], directory: Path) -> list[tuple[dict[str, int], int, int, int]]:
    """Of a model under training: bytes in blocks by kind, in files, and quantized; and elements of clusters."""
    found = []
    for how in residuals:
        words = [f"precision.residuals={how}", "train.precision=bfloat16", f"memory.directory={directory}"]
        config = load_config(None, [*SMALL, TIGHT, "memory.offload=true", *words])
        process = init_distributed(config.world)
        mesh = Mesh.create(WorldShape(1, 1, 1), timedelta(seconds=60))
        memory = ExpertMemory(config, config.moe.clusters, process.rank, process.device)
        LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), 8, memory=memory)
        for cluster in memory.clusters.values():
            memory.device.evict(cluster.block(TensorKind.WEIGHT))
        sizes = [cluster.sizes() for cluster in memory.clusters.values()]
        by_kind = {kind.value: sum(size[kind].bytes for size in sizes) for kind in sizes[0]}
        files = sum(file.stat().st_size for file in directory.glob("*/layer-*.bin"))
        stored = stored_sizes(config, config.moe.experts_per_cluster).nbytes * len(sizes)
        found.append((by_kind, files, stored, sum(cluster.layout.elements for cluster in memory.clusters.values())))
        memory.close()
    return found


def test_tiers_of_training_hold_weights_and_masters_and_nothing_in_few_bits(tmp_path: Path) -> None:
    """Every cluster is updated at every step (ADR 14), so that each parameter takes 2 + 4 + 4 + 8 bytes."""
    plain, *rounded = run_ranks(_bytes_by_kind, 1, ["none", "post", "qat"], tmp_path)[0]
    by_kind, files, stored, elements = plain
    wide = dict.fromkeys(("gradient", "master", "exp_avg", "exp_avg_sq"), 4 * elements)
    assert by_kind == {"weight": 2 * elements, **wide}
    assert 0 <= files - 18 * elements < 5 * 8 * 4096, "five blocks of each of eight clusters, whole pages"
    assert stored < by_kind["weight"]
    assert rounded == [plain, plain]


def _refused(directory: Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        _story((1, 1, 1), ["memory.device_budget_bytes=20000"], 1, directory)
    return str(refusal.value)


def test_a_budget_that_cannot_do_is_refused_with_the_least_that_would(tmp_path: Path) -> None:
    message = run_ranks(_refused, 1, tmp_path)[0]
    assert message.startswith("memory.device_budget_bytes=20000 is less than the ")
    least = int(message.rpartition("set it to ")[2].removesuffix(" or more"))
    run_ranks(_both, 1, (1, 1, 1), [[f"memory.device_budget_bytes={least}"]], 1, tmp_path)


def _damaged(directory: Path) -> str:
    config = load_config(
        None, [*SMALL, TIGHT, "memory.prefetch=0", "memory.offload=true", f"memory.directory={directory}"]
    )
    process = init_distributed(config.world)
    mesh, batch = Mesh.create(WorldShape(1, 1, 1), timedelta(seconds=60)), resolve_batch(config, 1)
    memory = ExpertMemory(config, config.moe.clusters, 0, process.device)
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation, memory=memory)
    engine = DeepSpeedEngine(model, config, batch, process)
    memory.device.evict(memory.clusters[1, 2].block(TensorKind.WEIGHT))
    with (directory / "rank-00000" / "layer-001.bin").open("r+b") as file:
        file.write(bytes([1]) * (1 << 20))
    with pytest.raises(OffloadError) as error:
        engine.forward_backward(torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(0)))
    memory.close()
    return str(error.value)


def test_damage_between_two_uses_stops_the_step_and_is_named(tmp_path: Path) -> None:
    message = run_ranks(_damaged, 1, tmp_path)[0]
    assert message.startswith(f"{tmp_path}/rank-00000/layer-001.bin: weight of layer 1, cluster ")
    assert "is damaged: its checksum is wrong" in message


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


BUDGET = 200_000
"""Bytes: less than a third of what the experts of these runs take, blocks of 20,480."""


def _final(run: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((run / "final").glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@pytest.mark.slow
def test_runs_with_and_without_tiers_go_on_from_each_others_checkpoints(tmp_path: Path) -> None:
    """Four runs of six steps, re-clustered twice: each way of training alone, and each from the other's third step."""
    runs = tmp_path / "runs"
    common = [f"runs_dir={runs}", f"corpus.cache_dir={tmp_path}/cache", "tensorboard=false", "train.steps=6"]
    common += ["checkpoint.every=3", "recluster.period=2", "recluster.start=2", "recluster.threshold=0"]
    away = ["memory.offload=true", f"memory.device_budget_bytes={BUDGET}"]
    for name, words in {
        "plain": [],
        "away": away,
        "to-memory": [f"checkpoint.resume={runs}/away/checkpoints/step-00000003"],
        "to-tiers": [*away, f"checkpoint.resume={runs}/plain/checkpoints/step-00000003"],
    }.items():
        run_ranks(_train, 1, [*common, f"name={name}", *words], timeout=300)
    names = ("plain", "away", "to-memory", "to-tiers")
    summaries: dict[str, Any] = {name: json.loads((runs / name / "summary.json").read_text()) for name in names}
    final = {name: _final(runs / name) for name in names}
    for name in names:
        assert summaries[name]["validation"]["loss"] == summaries["plain"]["validation"]["loss"], name
        assert final[name].keys() == final["plain"].keys()
        assert not [key for key, value in final["plain"].items() if not torch.equal(final[name][key], value)], name
    offload = summaries["away"]["memory"]["offload"]
    assert offload["budget_bytes"] == BUDGET
    assert BUDGET - offload["peak_device_bytes"] < 20_480, "the budget was never needed"
    assert summaries["plain"]["memory"]["offload"] is None
    assert not (runs / ".offload").exists()


def _open(directory: Path) -> list[str]:
    config = load_config(None, [*SMALL, "memory.offload=true", f"memory.directory={directory}"])
    memory = ExpertMemory(config, 4, 0, init_distributed(config.world).device)
    found = sorted(path.name for path in directory.rglob("*"))
    memory.close()
    return found


def test_what_a_killed_run_of_more_ranks_has_left_is_removed(tmp_path: Path) -> None:
    for rank in range(3):
        folder = tmp_path / f"rank-{rank:05}"
        folder.mkdir()
        (folder / "layer-007.bin").write_bytes(b"left")
        (folder / "lock").write_text("its owner is dead")
    assert run_ranks(_open, 1, tmp_path)[0] == ["lock", "rank-00000"]
    assert not list(tmp_path.iterdir())


def test_a_run_does_not_take_another_runs_directory(tmp_path: Path) -> None:
    words = [*SMALL, "memory.offload=true", f"memory.directory={tmp_path}"]
    first = ExpertMemory(load_config(None, words), 4, 0, torch.device("cpu"))
    with pytest.raises(MoeDistError, match="is used by another run"):
        ExpertMemory(load_config(None, words), 4, 0, torch.device("cpu"))
    first.close()
