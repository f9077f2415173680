"""Muon for whole matrices: as torch's own, alike in every layout, with its momentum in checkpoints and migrations.

torch's Newton-Schulz steps are in bfloat16, whose rounding differs wherever gradients are summed in another order.
Where weights are compared to 1e-5 these steps are in float32.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.config import WorldShape, load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.model.language_model import LanguageModel
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import (
    SEQUENCES,
    SMALL,
    STEPS,
    VOCABULARY,
    Trained,
    _assert_alike,
    _train_variant,
    _weights_by_global_name,
)
from tests.distributed.test_migration import _exchanged
from tests.distributed.test_refit import _refactored
from tests.distributed.test_warmup import _change_and_look, _words

pytestmark = pytest.mark.timeout(400)
MUON = ["optimizer.kind=muon"]
VARIANTS = [
    [*MUON, "world.zero_stage=0", "moe.top_clusters=2"],
    [*MUON, "world.zero_stage=1", "model.tie_embeddings=false"],
    [*MUON, "world.zero_stage=2", "moe.base=shared+cluster", "moe.base_rank=3"],
    [*MUON, "world.zero_stage=1", "moe.kind=standard", "moe.shared_expert_hidden=8"],
    [*MUON, "world.zero_stage=2", "moe.kind=dense"],
]
SHAPES: list[tuple[int, ...]] = [
    (2, 1, 1),
    (1, 2, 1),
    (2, 2, 1),
    (1, 2, 2),
    (2, 1, 1, 1, 1, 2),
    (2, 1, 1, 1, 1, 1, False, 2),
]
"""data, cluster, shard, replicas, tensor, context, slices, pipeline stages."""


def _in_float32(work: Callable[..., Any], *args: Any) -> Any:
    with mock.patch.object(Tensor, "bfloat16", Tensor.clone):
        return work(*args)


def _train(axes: tuple[int, ...]) -> list[Trained]:
    shape = WorldShape(*axes)  # type: ignore[arg-type]
    layout = [f"world.{axis}={getattr(shape, axis)}" for axis in ("context", "pipeline")]
    return [_train_variant(shape, load_config(None, [*SMALL, *layout, *words])) for words in VARIANTS]


@cache
def _reference() -> list[Trained]:
    (trained,) = run_ranks(_in_float32, 1, _train, (1, 1, 1), timeout=180)
    return list(trained)


def _matrix(name: str, parameter: Tensor) -> bool:
    """Return True if Muon should update a parameter, by its name as in the module."""
    listed = ("linear_qkv", "linear_proj", "w_in_DH", "w_out_FD", "w_in", "w_out")
    return parameter.ndim == 2 and any(word in name.split(".") for word in listed)


def _train_plainly() -> list[Trained]:
    return [_train_variant_plainly(words) for words in VARIANTS]


def _train_variant_plainly(words: list[str]) -> Trained:
    """The same steps with torch's `Muon` and `AdamW`, on one process that holds whole matrices."""
    config = load_config(None, [*SMALL, *words])
    process = init_distributed(config.world)
    mesh = Mesh.create(WorldShape(1, 1, 1), timedelta(seconds=60))
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), SEQUENCES)
    options, trained, optimizers = config.optimizer, Trained(), list[torch.optim.Optimizer]()
    for name, parameter in model.named_parameters():
        scale = 0.5 if {"w_in", "w_out", "w_in_DH", "w_out_FD"} & set(name.split(".")) else 1.0
        rate = options.learning_rate * (options.router_lr_scale if ".router." in name else scale)
        plain = parameter.ndim == 1 or "embedding" in name or name.endswith(("gate_NF", "bias_NH", "bias_ND"))
        decay = 0.0 if plain else options.weight_decay
        if _matrix(name, parameter):
            optimizers.append(torch.optim.Muon([parameter], rate, decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
        else:
            betas = (options.beta1, options.beta2)
            optimizers.append(torch.optim.AdamW([parameter], rate, betas, options.epsilon, weight_decay=decay))
    data = torch.randint(VOCABULARY, (STEPS, SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        model.zero_grad()
        losses = [model(sequence[None]) / SEQUENCES for sequence in data[step]]
        for loss in losses:
            loss.backward()
        trained.losses.append(sum(float(loss.detach()) for loss in losses))
        trained.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)))
        for optimizer in optimizers:
            optimizer.step()
        balance = model.context.balance
        if config.moe.kind != "dense":
            balance.update(balance.count_LE, model.context.placements)
        balance.count_LE.zero_()
    trained.weights = {name: value.clone() for name, value in _weights_by_global_name(model).items()}
    trained.biases = [model.context.balance.cluster_bias_LG, model.context.balance.expert_bias_LE]
    return trained


def test_one_rank_does_what_torch_s_muon_does() -> None:
    (plain,) = run_ranks(_in_float32, 1, _train_plainly)
    for words, expected, trained in zip(VARIANTS, plain, _reference(), strict=True):
        _assert_alike(trained, expected, f"{words} against plain torch")


@pytest.mark.parametrize("axes", SHAPES, ids=str)
def test_any_layout_trains_like_one_rank(axes: tuple[int, ...]) -> None:
    ranks = WorldShape(*axes).ranks  # type: ignore[arg-type]
    outcomes = run_ranks(_in_float32, ranks, _train, axes, timeout=180)
    for number, words in enumerate(VARIANTS):
        expected, seen = _reference()[number], set[str]()
        assert all(norm > 0.5 for norm in expected.norms), "the clipping must act, or it is not tested"
        for rank in range(ranks):
            _assert_alike(outcomes[rank][number], expected, f"{words}, rank {rank}")
            seen |= set(outcomes[rank][number].weights)
        assert seen == set(expected.weights), f"{words}: every weight must be held by some rank"


MOVED = [[*MUON, "world.zero_stage=0"], [*MUON, "world.zero_stage=1", "moe.top_clusters=2"]]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 2, 1), (1, 2, 2)], ids=str)
def test_experts_move_and_are_refitted_like_on_one_rank(axes: tuple[int, int, int]) -> None:
    for work in (_exchanged, _refactored):
        (alone,) = run_ranks(_in_float32, 1, work, (1, 1, 1), MOVED, timeout=180)
        for rank, stories in enumerate(run_ranks(_in_float32, 4, work, axes, MOVED, timeout=180)):
            for words, story, expected in zip(MOVED, stories, alone, strict=True):
                assert story.losses == pytest.approx(expected.losses, rel=1e-4), f"{words}, rank {rank}"


def test_momentum_is_kept_when_standard_experts_become_clusters(tmp_path: Path) -> None:
    words = _words(tmp_path, *MUON, "world.zero_stage=1", "world.data=1")
    for seen in run_ranks(_change_and_look, 2, words):
        assert seen["lost"] == []
        assert seen["alive"] == [False, False]
