"""Experts sliced along their hidden width train like whole ones, and checkpoints go from one to the other."""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.find import checked
from moe_dist.checkpoint.run_state import RunState
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import load_config, resolve_batch, resolve_world
from moe_dist.dispatch.layout_advice import expected_bytes
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.parameter_counts import count_parameters
from moe_dist.moe.clustered_experts import ClusterBase
from moe_dist.moe.parameter_class import ParameterClass, class_of
from moe_dist.simulator.sizes import parameters_on_rank
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint_state import DATA
from tests.distributed.test_engine_equality import SEQUENCES, SMALL, VOCABULARY

pytestmark = pytest.mark.timeout(600)
VARIANTS = [
    ["world.zero_stage=0"],
    ["world.zero_stage=1", "moe.top_clusters=2", "moe.overlap_chunks=2", "model.activation_checkpointing=true"],
    ["world.zero_stage=2"],
    ["world.zero_stage=2", "moe.expert_vectors=false"],
    ["world.zero_stage=1", "moe.expert_hidden=64", "precision.residuals=qat", "precision.group_size=32"],
]
SLICED = ["world.shard=2", "world.shard_mode=slice"]


@dataclass
class Told:
    """What one rank saw in one variant."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parameters: int = 0
    of_bases: int = 0
    bytes_per_token_layer: tuple[float, float] = (0.0, 0.0)
    """Sent in the first step beside counts, and expected."""


def _engine(words: list[str]) -> DeepSpeedEngine:
    config = load_config(None, [*SMALL, *words])
    process = init_distributed(config.world)
    mesh = Mesh.create(resolve_world(config, process.ranks), timedelta(seconds=60))
    batch = resolve_batch(config, process.ranks)
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
    return DeepSpeedEngine(model, config, batch, process)


def _steps(engine: DeepSpeedEngine, first: int, last: int, told: Told) -> None:
    mesh = engine.model.context.mesh
    share, group = SEQUENCES // mesh.shape.sequence_groups, mesh.in_attention.group
    for step in range(first, last):
        data = torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        outcome = engine.forward_backward(data[group * share : (group + 1) * share])
        if step == 0:
            told.bytes_per_token_layer = _traffic(engine)
        told.losses.append(outcome.loss)
        told.norms.append(engine.update(outcome, 1e-3))


def _traffic(engine: DeepSpeedEngine) -> tuple[float, float]:
    sent = engine.model.context.ledger.sent.items()
    total = sum(volume.bytes for key, volume in sent if key.payload is not Payload.COUNTS)
    config = engine.config
    tokens = SEQUENCES // engine.process.ranks * config.model.sequence_length
    expected = expected_bytes(config.model, config.moe, engine.model.context.mesh.shape)
    return total / tokens / config.model.layers, expected


def _story(layout: list[str], folder: Path, before: Path | None) -> list[Told]:
    """Train five steps, or the last two from the checkpoint of another layout; save after the third and the last."""
    stories = []
    for number, words in enumerate(VARIANTS):
        engine, told = _engine([*words, *layout]), Told()
        state = RunState(engine, DATA, {"balance": engine.model.context.balance})
        if before is None:
            _steps(engine, 0, 3, told)
            write_checkpoint(folder / f"{number}", *state.checkpoint(3), engine.process.rank)
        else:
            state.restore(checked(before / f"{number}"))
        _steps(engine, 3, 5, told)
        write_checkpoint(folder / f"weights-{number}", *state.weights(5), engine.process.rank)
        told.parameters = count_parameters(engine.model).total
        held = dict.fromkeys(ParameterClass, 0)
        for parameter in engine.model.parameters():
            held[class_of(parameter)] += parameter.numel()
        assert held == parameters_on_rank(engine.config, engine.model.context.mesh.shape, VOCABULARY)
        bases = [module for module in engine.model.modules() if isinstance(module, ClusterBase)]
        told.of_bases = sum(parameter.numel() for base in bases for parameter in base.parameters())
        stories.append(told)
    return stories


def _weights(folder: Path, number: int) -> dict[str, Tensor]:
    file = folder / f"{number}.safetensors"
    export_weights(find_weights(folder / f"weights-{number}"), file)
    return load_file(file)


@pytest.mark.parametrize(("ranks", "layout"), [(2, SLICED), (4, [*SLICED, "world.tensor=2"])])
def test_slices_train_like_whole_experts_and_checkpoints_fit_both(
    ranks: int, layout: list[str], tmp_path: Path
) -> None:
    whole, sliced, back, forth = (tmp_path / name for name in ("whole", "sliced", "back", "forth"))
    for folder in (whole, sliced, back, forth):
        folder.mkdir()
    (alone,) = run_ranks(_story, 1, [], whole, None, timeout=280)
    found = run_ranks(_story, ranks, layout, sliced, None, timeout=280)
    (from_slices,) = run_ranks(_story, 1, [], back, sliced, timeout=280)
    into_slices = run_ranks(_story, ranks, layout, forth, whole, timeout=280)
    for number, words in enumerate(VARIANTS):  # a quantized code may turn with the last bit of a sum
        expected, rough = (
            alone[number],
            "precision.residuals=qat" in words,
        )
        rel = 1e-3 if rough else 1e-5
        for rank in range(ranks):
            told = found[rank][number]
            assert told.losses == pytest.approx(expected.losses, rel=rel), f"{words}, rank {rank}"
            assert told.norms == pytest.approx(expected.norms, rel=0.05 if rough else 1e-4), f"{words}, rank {rank}"
            assert told.parameters == expected.parameters
            assert told.of_bases * ranks == expected.of_bases
            assert into_slices[rank][number].losses == pytest.approx(expected.losses[3:], rel=rel), words
        assert from_slices[number].losses == pytest.approx(expected.losses[3:], rel=rel), words
        wanted = _weights(whole, number)
        for folder in (sliced, back, forth):
            weights = _weights(folder, number)
            assert weights.keys() == wanted.keys()
            for name, value in wanted.items():
                close = torch.allclose(weights[name], value, atol=1e-2 if rough else 1e-5)
                assert close, f"{words}: {folder.name}, {name}"
    if ranks == 2:  # no stage one: every row is sent to the other rank
        sent, predicted = found[0][0].bytes_per_token_layer
        assert sent == pytest.approx(predicted)
