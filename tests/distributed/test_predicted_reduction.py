"""The simulator's rounds of gradients and weights against the collectives that DeepSpeed issues, on two ranks."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.config import WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.model.language_model import LanguageModel
from moe_dist.simulator.memory import replicas
from moe_dist.simulator.sizes import parameters_on_rank
from moe_dist.simulator.step_time import reduction_rounds
from tests.distributed.ranks import run_ranks

VOCABULARY = 256
WORDS = [
    "model.hidden_size=64", "model.heads=2", "model.sequence_length=16", "moe.experts=8", "moe.clusters=4",
    "moe.expert_hidden=64", "train.global_batch_size=8", "train.micro_batch_size=2", "train.precision=float32",
]  # fmt: skip
ROUNDS = {"all_reduce": 2, "all_gather_into_tensor": 1}  # an all-reduce scatters sums, then gathers them


class _Counted:
    """Bytes that collectives carry among several ranks, times how often they go around."""

    def __init__(self) -> None:
        self.bytes = 0
        for name, rounds in ROUNDS.items():
            setattr(dist, name, self._counting(getattr(dist, name), rounds))

    def _counting(self, function: Callable[..., Any], rounds: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if args else next(iter(kwargs.values()))  # reduced, or gathered into
            group = kwargs.get("group")
            if dist.get_world_size(group) > 1:
                self.bytes += rounds * tensor.numel() * tensor.element_size()
            return function(*args, **kwargs)

        return counting


def _carried(stages: list[int]) -> list[tuple[int, float]]:
    """For each ZeRO stage, bytes times rounds of one step of two micro-batches: counted, and predicted."""
    counted = _Counted()  # before DeepSpeed keeps references
    return [_of_stage(stage, counted) for stage in stages]


def _of_stage(stage: int, counted: _Counted) -> tuple[int, float]:
    config, shape = load_config(None, [*WORDS, f"world.zero_stage={stage}"]), WorldShape(2, 1, 1)
    process = init_distributed(config.world)
    batch = resolve_batch(config, process.ranks)
    mesh = Mesh.create(shape, timedelta(seconds=60))
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
    engine = DeepSpeedEngine(model, config, batch, process)
    counted.bytes = 0
    engine.update(engine.forward_backward(torch.randint(VOCABULARY, (4, 17))), 1e-3)
    held = parameters_on_rank(config, shape, VOCABULARY)
    replicated = sum(held[kind] for kind, ranks in replicas(shape).items() if ranks > 1)
    return counted.bytes, 4.0 * replicated * reduction_rounds(config, batch)


def test_deepspeed_carries_as_much_as_predicted() -> None:
    stages = [0, 1, 2]
    for outcomes in run_ranks(_carried, 2, stages):
        for stage, (carried, predicted) in zip(stages, outcomes, strict=True):
            assert carried == pytest.approx(predicted, rel=0.03), f"ZeRO {stage}"  # padding, norms, loads
