"""The planner's memory against what the engine really allocates, on two ranks."""

from collections.abc import Iterable
from datetime import timedelta

import pytest
import torch

from moe_dist.config import WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.engine.optimizer import MOMENTS
from moe_dist.engine.optimizer_state import MASTER, OptimizerState
from moe_dist.model.language_model import LanguageModel
from moe_dist.simulator.memory import memory_of_stage
from tests.distributed.ranks import run_ranks

VOCABULARY = 256
WORDS = [
    "model.hidden_size=64", "model.heads=2", "model.sequence_length=16", "moe.experts=8", "moe.clusters=4",
    "moe.expert_hidden=64", "train.global_batch_size=4",
]  # fmt: skip


Bytes = tuple[int, int]


def _allocated(shape: WorldShape, variants: list[list[str]]) -> list[tuple[Bytes, tuple[float, float]]]:
    """For each variant (weights, optimizer) in bytes: of the tensors there are, and predicted."""
    return [_of_variant(shape, [*WORDS, f"world.pipeline={shape.pipeline}", *more]) for more in variants]


def _of_variant(shape: WorldShape, words: list[str]) -> tuple[Bytes, tuple[float, float]]:
    config = load_config(None, words)
    process = init_distributed(config.world)
    batch = resolve_batch(config, process.ranks)
    mesh = Mesh.create(shape, timedelta(seconds=60))
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
    engine = DeepSpeedEngine(model, config, batch, process)
    engine.update(engine.forward_backward(torch.randint(VOCABULARY, (batch.micro * batch.accumulation, 17))), 1e-3)
    optimizer = engine._engine.optimizer
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    masters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if "exp_avg" in name]
    kept = [tensor for tensor in (*masters, *moments) if tensor.untyped_storage().data_ptr() not in weights]
    state = engine.training_state()
    packed = [parameter for parameter in model.parameters() if state.is_packed(parameter)]
    muon = [parameter for parameter in model.parameters() if len(state.names_of(parameter)) == 2]
    kept += [tensor for one in muon for tensor in _masters(state, one)]
    moments_of_packed = [tensor for parameter in (*packed, *muon) for tensor in _moments(state, parameter)]
    found = memory_of_stage(config, shape, batch, VOCABULARY, mesh.stage)
    predicted = (found.dense_weights + found.base_weights + found.expert_weights, found.optimizer)
    weights_and_codes = _bytes(model.parameters()) + sum(state.bytes_of(parameter) for parameter in packed)
    return (weights_and_codes, _bytes([*kept, *moments_of_packed])), predicted


def _moments(state: OptimizerState, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    fragment = state.fragment(parameter)
    return [] if fragment is None else [fragment.tensors[name] for name in MOMENTS if name in fragment.tensors]


def _masters(state: OptimizerState, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    fragment = state.fragment(parameter)
    return [] if fragment is None or not state.has_separate_master(parameter) else [fragment.tensors[MASTER]]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


VARIANTS = [
    [f"world.zero_stage={stage}", f"train.precision={precision}"]
    for stage in (0, 1, 2)
    for precision in ("float32", "bfloat16")
]
MUON = [[*words, "optimizer.kind=muon"] for words in VARIANTS]
VARIANTS += [[*words, "precision.residuals=packed", "precision.group_size=32"] for words in VARIANTS[1::2]]
VARIANTS += [*MUON, [*MUON[3], "moe.kind=standard", "moe.shared_expert_hidden=16"], [*MUON[2], "moe.kind=dense"]]


SHAPES = [WorldShape(2, 1, 1), WorldShape(1, 1, 2), WorldShape(1, 1, 1, pipeline=2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_and_optimizer_state_are_as_predicted(shape: WorldShape) -> None:
    for outcomes in run_ranks(_allocated, 2, shape, VARIANTS):
        for words, (allocated, predicted) in zip(VARIANTS, outcomes, strict=True):
            assert predicted[0] == allocated[0], words
            assert predicted[1] == pytest.approx(allocated[1], rel=0.02), words  # ZeRO pads its partitions
