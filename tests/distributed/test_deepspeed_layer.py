"""Clustered layers in a DeepSpeed script: the training of one process, for any ep_size, ZeRO stage and clipping."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moe_dist.errors import ConfigError
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
KEYS = MOE.model_dump(include={"clusters", "expert_hidden", "rank", "wire_dtype", "backend", "balance_rate"})


def _layer(ep_size: int, seed: int, **more: Any) -> Any:
    from moe_dist.integrations.deepspeed import DeepSpeedClusteredMoE

    return DeepSpeedClusteredMoE(WIDTH, MOE.experts, ep_size, k=MOE.top_k, seed=seed, init_std=0.3, **KEYS | more)


def _engine(ep_size: int, stage: int, clip: bool) -> Any:
    import deepspeed

    from moe_dist.integrations.deepspeed import attach

    model = SmallModel(lambda seed: _layer(ep_size, seed))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIP if clip else 0.0,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    attach(engine)
    return engine


def _train(engine: Any, steps: range = range(STEPS)) -> list[float]:
    rank, ranks, losses = dist.get_rank(), dist.get_world_size(), []
    for step in steps:
        loss = loss_of(engine, step, rank, ranks)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def _trainings(cases: list[tuple[int, int, bool]], folder: str) -> list[Any]:
    from moe_dist.engine.deepspeed_init import init_deepspeed

    init_deepspeed()
    found: list[Any] = []
    for ep_size, stage, clip in cases:
        engine = _engine(ep_size, stage, clip)
        found.append((_train(engine), weights_of(engine.module)))
        engine.destroy()
    if folder:
        found += [_resumed(folder), losses_of_example("deepspeed_training.py")]
    return found


def _resumed(folder: str) -> Any:
    """A training interrupted after one step by DeepSpeed's own checkpoint."""
    engine = _engine(2, 1, False)
    losses = _train(engine, range(1))
    engine.save_checkpoint(folder, tag="one")
    _train(engine, range(5, 6))
    engine.load_checkpoint(folder, tag="one")
    return losses + _train(engine, range(1, STEPS)), weights_of(engine.module)


@cache
def _expected(clip: bool) -> Any:
    return plain_training(clip)


def _compare(ranks: int, cases: list[tuple[int, int, bool]], folder: str = "") -> None:
    for results in run_ranks(_trainings, ranks, cases, folder, timeout=240):
        if folder:
            losses = results.pop()
            assert losses[-1] < losses[0] - 0.3, "the example learns"
        for case, found in zip([*cases, (2, 1, False)] if folder else cases, results, strict=True):
            assert_trained_alike(found, _expected(case[2]), f"{ranks} ranks, ep_size, ZeRO, clipping {case}: ")


def test_two_ranks_train_like_one_and_resume(tmp_path: Path) -> None:
    cases = [(1, 0, True), (1, 2, True), (2, 0, True), (2, 1, True), (2, 2, False)]
    _compare(2, cases, str(tmp_path))


def test_four_ranks_train_like_one() -> None:
    _compare(4, [(2, 0, True), (2, 2, True)])


def _refusals() -> list[str]:
    messages = []
    cases: list[tuple[int, dict[str, Any]]] = [(3, {}), (2, {"balance": "aux_loss"}), (2, {"clusters": 1})]
    for ep_size, more in cases:
        with pytest.raises(ConfigError) as caught:
            _layer(ep_size, 0, **more)
        messages.append(str(caught.value))
    return messages


def test_what_cannot_work_is_refused_in_one_line() -> None:
    for number, aux, clusters in run_ranks(_refusals, 2):
        assert number == "ep_size=3 must divide the number of ranks (2) and clusters=4"
        assert aux == "balance=aux_loss, z_loss_weight=0.0: use balance='bias' and no z-loss"
        assert clusters == "ep_size=2 must divide the number of ranks (2) and clusters=1"
    with pytest.raises(ConfigError, match=r"call deepspeed.init_distributed\(\) before"):
        _layer(1, 0)
