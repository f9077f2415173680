"""Factors in few bits, end to end: what training sees, what is kept, exported and read back, and who has masters."""

import gc
import json
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.load_model import load_model
from moe_dist.checkpoint.manifest import DataRecord
from moe_dist.checkpoint.run_state import RunState
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import MemoryConfig, WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.memory.quantized_clusters import QuantizedClusterMemory
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.quantized_experts import QuantizedClusterExperts, stored_sizes
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import SEQUENCES, SMALL, VOCABULARY
from tests.distributed.test_migration import BLOCKS, MOVES, Training

pytestmark = pytest.mark.timeout(400)
SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
DATA = DataRecord(train_checksum=1, validation_checksum=2, vocab_size=VOCABULARY, next_step=0)
VARIANTS = [
    ["precision.residuals=qat", "train.precision=float32"],
    ["precision.residuals=qat", "train.precision=bfloat16", "world.zero_stage=2", "moe.top_clusters=2"],
    ["precision.residuals=qat", "train.precision=float32", "precision.bases=bfloat16", "precision.symmetric=false"],
    [
        "precision.residuals=post",
        "train.precision=bfloat16",
        "precision.scale_dtype=float16",
        "precision.group_size=32",
    ],
    ["precision.residuals=none", "train.precision=bfloat16"],
    ["precision.residuals=packed", "train.precision=bfloat16", "world.zero_stage=1", "moe.top_clusters=2"],
    ["precision.residuals=packed", "train.precision=float32", "precision.bits=8", "precision.group_size=32"],
]

SEEN_AS_STORED = ("precision.residuals=qat", "precision.residuals=packed")


def _engine(axes: tuple[int, int, int], words: list[str]) -> DeepSpeedEngine:
    config = load_config(None, [*SMALL, *words])
    process = init_distributed(config.world)
    batch = resolve_batch(config, process.ranks)
    mesh = Mesh.create(WorldShape(*axes), timedelta(seconds=60))
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
    return DeepSpeedEngine(model, config, batch, process)


def _sequences(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))


def _three_steps(engine: DeepSpeedEngine) -> None:
    rank, share = engine.process.rank, SEQUENCES // engine.process.ranks
    for step in range(3):
        mine = _sequences(step)[rank * share : (rank + 1) * share]
        engine.update(engine.forward_backward(mine), 1e-2)


def _losses(model: LanguageModel) -> Tensor:
    with model.evaluating():
        return model.token_losses(_sequences(9)[:2])


def _trained_and_stored(axes: tuple[int, int, int], folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Losses of each variant as training sees it, and with stored experts; its weights go into the folder."""
    found = []
    for number, words in enumerate(VARIANTS):
        engine = _engine(axes, words)
        _three_steps(engine)
        manifest, state = RunState(engine, DATA, {}).weights(3)
        write_checkpoint(folder / f"{number}", manifest, state, engine.process.rank)
        seen = _losses(engine.model)
        with engine.model.with_quantized_experts():
            found.append((seen, _losses(engine.model)))
        assert torch.equal(_losses(engine.model), seen)  # what is trained is back
    return found


def _no_experts(self: ClusteredExperts, *_: Any) -> None:
    raise AssertionError("experts of a file that holds them in few bits are made in full")


def _loaded(axes: tuple[int, int, int], folder: Path) -> list[tuple[Tensor, int, int]]:
    """Losses of each exported file, and bytes of a rank's experts: base, and what is each expert's own."""
    process = init_distributed(load_config(None, SMALL).world)
    mesh = Mesh.create(WorldShape(*axes), timedelta(seconds=60))
    found = []
    for number in range(len(VARIANTS)):
        weights = find_weights(folder / f"{number}.safetensors")
        with mock.patch.object(ClusteredExperts, "__init__", _no_experts) if weights.stored else nullcontext():
            model = load_model(weights, mesh, Links.discover(process.device), process.device)
        parts = [part for layer in model.clustered_layers() for part in layer.clusters]
        stored = [part for part in parts if isinstance(part, QuantizedClusterExperts)]
        assert len(stored) == (len(parts) if weights.config.precision.residuals != "none" else 0)
        assert not any(list(part.parameters()) for part in stored)
        base = sum(part.base_in_DH.nbytes + part.base_out_FD.nbytes for part in stored)
        found.append((_losses(model), base, sum(part.expert_NB.nbytes for part in stored)))
    return found


def _loaded_in_tiers(axes: tuple[int, int, int], folder: Path) -> list[tuple[Tensor, int, int]]:
    """Losses of each file of stored clusters under a budget of two of them; bytes of a rank's blocks, and in its files.

    Blocks are aligned to 16 bytes, and pages of files to 4,096.
    """
    process = init_distributed(load_config(None, SMALL).world)
    mesh = Mesh.create(WorldShape(*axes), timedelta(seconds=60))
    found = []
    for number in range(len(VARIANTS)):
        weights = find_weights(folder / f"{number}.safetensors")
        if not weights.stored:
            continue
        cluster = stored_sizes(weights.config, 4).nbytes
        directory = folder / f"tier-{number}"
        memory = MemoryConfig(
            offload=True, device_budget_bytes=2 * (cluster + 48), directory=str(directory), prefetch=1
        )
        config = weights.config.model_copy(update={"memory": memory})
        kept = QuantizedClusterMemory(config, config.moe.clusters // axes[1], process.rank, process.device)
        links = Links.discover(process.device)
        with mock.patch.object(ClusteredExperts, "__init__", _no_experts):
            model = load_model(weights, mesh, links, process.device, memory=kept)
        losses, figures = _losses(model), kept.tiers.figures()
        assert not any(
            buffer.numel() for name, buffer in model.named_buffers() if "base" in name and not buffer.is_meta
        )
        assert 0 < figures["peak_device_bytes"] <= (memory.device_budget_bytes or 0)
        sizes = [size.bytes for size in kept.tiers.device._sizes.values()]
        assert sum(sizes) < len(sizes) * (cluster + 48)
        files = list((directory / f"rank-{process.rank:05}").glob("*.bin"))
        found.append((losses, sum(sizes), sum(file.stat().st_size for file in files)))
        kept.close()
        assert not (directory / f"rank-{process.rank:05}").exists()
    return found


def test_what_training_sees_is_what_an_exported_file_computes_bit_by_bit(tmp_path: Path) -> None:
    trained = run_ranks(_trained_and_stored, 2, (1, 2, 1), tmp_path, timeout=170)
    for number, words in enumerate(VARIANTS):
        weights = find_weights(tmp_path / f"{number}")
        stored = weights.config.precision.residuals != "none"
        count = export_weights(weights, tmp_path / f"{number}.safetensors", stored=stored)
        assert count == export_weights(weights, tmp_path / f"{number}-plain.safetensors"), words
    loaded = run_ranks(_loaded, 2, (1, 2, 1), tmp_path, timeout=170)
    for number, words in enumerate(VARIANTS):
        for rank in range(2):
            seen, kept = trained[rank][number]
            assert torch.equal(seen, kept) is (words[0] in SEEN_AS_STORED), f"{words}, rank {rank}"
            assert kept.mean().item() == pytest.approx(seen.mean().item(), rel=0.01), words
            expected = seen if "precision.residuals=none" in words else kept
            assert torch.equal(loaded[rank][number][0], expected), f"{words}, rank {rank}"
    in_tiers = run_ranks(_loaded_in_tiers, 2, (1, 2, 1), tmp_path, timeout=170)
    for rank in range(2):
        in_memory = [one for one in loaded[rank] if one[1]]
        for (losses, blocks, files), (expected, base, own) in zip(in_tiers[rank], in_memory, strict=True):
            assert torch.equal(losses, expected)
            assert base + own <= blocks < base + own + 16 * 48
            assert blocks <= files < blocks + 8 * 4096, "four clusters of each of two layers, whole pages"
    (alone,) = run_ranks(_loaded, 1, (1, 1, 1), tmp_path, timeout=170)  # another layout: sums in another order
    for number, words in enumerate(VARIANTS):
        tolerance = 1e-5 if "train.precision=float32" in words else 0.01
        assert alone[number][0].mean().item() == pytest.approx(loaded[0][number][0].mean().item(), rel=tolerance)
        assert alone[number][1:] == (2 * loaded[0][number][1], 2 * loaded[0][number][2])


QAT = [
    ["precision.residuals=qat", "train.precision=float32", "moe.top_clusters=2"],
    ["precision.residuals=qat", "train.precision=bfloat16", "world.zero_stage=2"],
    ["precision.residuals=packed", "train.precision=float32", "world.zero_stage=1"],
    ["precision.residuals=packed", "train.precision=bfloat16", "world.zero_stage=0"],
]


def _moved(axes: tuple[int, int, int]) -> list[tuple[list[float], Tensor, Tensor, int]]:
    """Experts, then clusters move: losses of steps, of tokens as seen and as stored, and bytes sent."""
    found = []
    for words in QAT:
        training = Training(axes, words)
        training.step()
        training.step()
        moved, crossed, _ = training.coordinator.executor.exchange(MOVES, training.sequences(1))
        assert moved == MOVES
        training.step()
        crossed += training.coordinator.executor.relocate(BLOCKS[axes[1]])
        training.step()
        seen = _losses(training.model)
        with training.model.with_quantized_experts():
            found.append((training.losses, seen, _losses(training.model), crossed))
    return found


def test_experts_that_move_are_trained_as_they_will_be_stored() -> None:
    """A code may turn with the last bit of a sum: layouts agree less closely than where nothing is rounded."""
    (alone,) = run_ranks(_moved, 1, (1, 1, 1))
    for rank in run_ranks(_moved, 2, (1, 2, 1)):
        for (losses, seen, kept, crossed), (expected, *_), words in zip(rank, alone, QAT, strict=True):
            assert crossed > 0
            assert torch.equal(seen, kept)
            assert losses == pytest.approx(expected, rel=1e-4 if "train.precision=float32" in words else 0.01)


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def _validation(folder: Path, name: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "runs" / name / "summary.json").read_text())
    return summary["validation"]  # type: ignore[no-any-return]


def test_a_run_tells_the_loss_of_what_is_stored(tmp_path: Path) -> None:
    """With rounds of re-clustering meanwhile, and a standard warm-up that knows nothing of it."""
    common = [f"runs_dir={tmp_path}/runs", f"corpus.cache_dir={tmp_path}/cache", "tensorboard=false"]
    moving = ["recluster.period=2", "recluster.start=3", "recluster.threshold=0"]
    run_ranks(_train, 2, [*common, "name=qat", "precision.residuals=qat", "train.precision=bfloat16", *moving])
    run_ranks(_train, 2, [*common, "name=post", "precision.residuals=post", "moe.warmup_standard=0.25"])
    qat, post = _validation(tmp_path, "qat"), _validation(tmp_path, "post")
    assert qat["loss_stored"] == qat["loss"]
    assert post["loss_stored"] != post["loss"]
    assert post["loss_stored"] == pytest.approx(post["loss"], rel=0.01)


def _float32_bytes(words: list[str]) -> tuple[set[torch.dtype], int, int]:
    """Types of the model's tensors; float32 bytes of this process after training; what the optimizer has of them."""
    engine = _engine((1, 1, 1), words)
    _three_steps(engine)
    gc.collect()
    model = engine.model
    types = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    state, owned = engine.training_state(), set()
    for parameter in model.parameters():
        fragment = state.fragment(parameter)
        assert fragment is not None
        owned |= {tensor.untyped_storage().data_ptr() for tensor in fragment.tensors.values()}
    assert owned <= storages.keys()
    return types, sum(storages.values()), sum(storages[pointer] for pointer in owned)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_float32_copies_are_the_optimizer_s_alone(zero_stage: int) -> None:
    words = ["train.precision=bfloat16", "precision.residuals=qat", f"world.zero_stage={zero_stage}"]
    ((types, alive, optimizer),) = run_ranks(_float32_bytes, 1, words)
    assert types == {torch.bfloat16}
    assert optimizer <= alive <= 1.02 * optimizer  # what is beside them is smaller than a copy of anything large
