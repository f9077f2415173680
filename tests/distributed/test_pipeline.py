"""Pipeline stages train like one rank: same losses, norms and weights, same re-clustering, same checkpoints."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import BatchShape, WorldShape, load_config, resolve_batch, resolve_world
from moe_dist.distributed.mesh import GroupKind, group_layout
from moe_dist.errors import ConfigError
from moe_dist.metrics import flatten
from moe_dist.simulator.collective_seconds import bubble
from moe_dist.simulator.memory import micro_batches_in_flight
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import (
    CLUSTERED,
    OTHERS,
    SMALL,
    Trained,
    _assert_alike,
    _train_variant,
)
from tests.distributed.test_resume import REGROUPING
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(300)
LAYOUTS = [
    WorldShape(1, 1, 1, pipeline=2),
    WorldShape(1, 1, 1, pipeline=4),
    WorldShape(1, 2, 1, pipeline=2),
    WorldShape(2, 1, 1, pipeline=2, chunks=2),
    WorldShape(1, 2, 1, tensor=2, pipeline=2, chunks=2),
    WorldShape(2, 1, 1, context=2, pipeline=2),
]
LATENT = "{kv_rank: 8, plain_dim: 6, rotary_dim: 4, value_dim: 6}"
UNLIKE_LAYERS = [
    ["moe.dense_layers=1", "moe.dense_hidden=24", f"model.latent={LATENT}"],
    ["model.window=5", "model.window_from=2"],
    ["moe.dense_layers=1", "moe.dense_hidden=24", "moe.kind=standard", "world.zero_stage=2"],
]
VARIANTS = [CLUSTERED[0], CLUSTERED[2], CLUSTERED[3], CLUSTERED[5], OTHERS[1], OTHERS[3], *UNLIKE_LAYERS]


def _train(shape: WorldShape, variants: list[list[str]]) -> list[Trained]:
    axes = [f"world.{axis}={getattr(shape, axis)}" for axis in ("tensor", "context", "pipeline")]
    layout = [*axes, f"world.virtual_pipeline={shape.chunks}", "model.layers=4"]
    return [_train_variant(shape, load_config(None, [*SMALL, *layout, *words])) for words in variants]


@cache
def _reference() -> list[Trained]:
    (trained,) = run_ranks(_train, 1, WorldShape(1, 1, 1), VARIANTS, timeout=180)
    return list(trained)


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_stages_train_like_one_rank(shape: WorldShape) -> None:
    variants = VARIANTS[LAYOUTS.index(shape) % 3 :: 3]
    outcomes = run_ranks(_train, shape.ranks, shape, variants, timeout=180)
    for number, words in enumerate(variants):
        expected, seen = _reference()[VARIANTS.index(words)], set[str]()
        for rank, trained in enumerate(outcomes):
            _assert_alike(trained[number], expected, f"{words}, rank {rank}")
            seen |= set(trained[number].weights)
        assert seen == set(expected.weights), f"{words}: every weight must be held by some rank"
        held = [set(trained[number].weights) for trained in outcomes]
        first, last = held[0], held[-1]
        assert not {name for name in first & last if ".layers." in name}, "stages hold their own layers only"


def test_the_bubble_by_hand() -> None:
    """Four stages and eight micro-batches: a stage waits for three passes of eight, in two chunks for half as long."""
    assert bubble(WorldShape(1, 1, 1, pipeline=4), BatchShape(1, 8)) == 3 / 8
    assert bubble(WorldShape(1, 1, 1, pipeline=4, chunks=2), BatchShape(1, 8)) == 3 / 16
    assert bubble(WorldShape(4, 1, 1), BatchShape(1, 8)) == 0
    in_flight = [micro_batches_in_flight(WorldShape(1, 1, 1, pipeline=4), BatchShape(1, 8), at) for at in range(4)]
    assert in_flight == [4, 3, 2, 1]


def _run(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def _lines(run: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def _leaves(figures: Any) -> dict[str, float]:
    return dict(flatten(figures)) if isinstance(figures, dict) else {"": figures or 0.0}


@pytest.mark.parametrize(
    ("transition", "layers"),
    [("adopt", []), ("refit", []), ("refit", ["model.layers=4", "moe.dense_layers=1", "moe.dense_hidden=24"])],
)
def test_a_run_with_stages_regroups_and_reports_as_without(tmp_path: Path, transition: str, layers: list[str]) -> None:
    common = [f"runs_dir={tmp_path}", f"corpus.cache_dir={tmp_path}/cache", "tensorboard=false", *REGROUPING]
    common += ["moe.wire_dtype=float32", "train.steps=4", "train.micro_batch_size=4"]
    common += [f"recluster.transition={transition}", *layers]
    run_ranks(_run, 2, [*common, "name=plain"])
    run_ranks(_run, 4, [*common, "name=staged", "world.pipeline=2"])
    plain, staged = tmp_path / "plain", tmp_path / "staged"
    for one, other in zip(_lines(plain, "metrics.jsonl"), _lines(staged, "metrics.jsonl"), strict=True):
        if "train" in other:
            assert 0 < other["train"].pop("pipeline_idle") < 1
        for key in ("train", "load", "validation"):
            assert _leaves(other.get(key)) == pytest.approx(_leaves(one.get(key)), rel=1e-4), (one["step"], key)
    rounds = [[line for line in _lines(run, "events.jsonl") if line["event"] == "recluster"] for run in (plain, staged)]
    assert sum(line["moved_experts"] for line in rounds[0]) > 0
    for one, other in zip(*rounds, strict=True):
        for key in ("members", "blocks", "moved_experts", "dropped_experts", "bytes", "relocation_bytes"):
            assert other[key] == one[key], key
        assert other["objective_after"] == pytest.approx(one["objective_after"], rel=1e-4)
        if transition == "refit":
            assert _leaves(other["output_errors"]) == pytest.approx(_leaves(one["output_errors"]), rel=1e-2)
    one, other = (json.loads((run / "summary.json").read_text()) for run in (plain, staged))
    assert other["parameters"] == one["parameters"]
    assert other["all_to_all"]["bytes"] == one["all_to_all"]["bytes"] > 0


def test_groups_of_eight_ranks_by_hand() -> None:
    """Two stages of data 1 x cluster 2 x shard 2, with tensor 2."""
    layout = group_layout(WorldShape(1, 2, 2, tensor=2, pipeline=2))
    groups = {kind: [ranks for other, ranks in layout if other is kind] for kind, _ in layout}
    assert groups[GroupKind.STAGE] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups[GroupKind.PIPELINE] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups[GroupKind.EXPERT_PARALLEL] == groups[GroupKind.STAGE]
    assert groups[GroupKind.STAGE_ONE] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups[GroupKind.TENSOR] == groups[GroupKind.CLUSTER] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups[GroupKind.TENSOR_DATA] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert GroupKind.STAGE not in dict(group_layout(WorldShape(2, 2, 2)))


def test_batch_and_ranks_are_divided_by_stage() -> None:
    config = load_config(SMOKE, ["world.pipeline=2", "world.cluster=2", "train.micro_batch_size=2"])
    shape, batch = resolve_world(config, 8), resolve_batch(config, 8)
    assert (shape.data, shape.cluster, shape.pipeline, shape.ranks, shape.stage_ranks) == (2, 2, 2, 8, 4)
    assert (batch.micro, batch.accumulation) == (2, 2)  # 16 sequences over 4 ranks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world.pipeline=3"], r"model\.layers=2 is not divisible by world\.pipeline=3"),
        (["world.virtual_pipeline=2"], r"world\.virtual_pipeline=2 needs world\.pipeline > 1"),
        (
            ["world.pipeline=2", "world.virtual_pipeline=2"],
            r"model\.layers=2 is not divisible by world\.pipeline=2 x world\.virtual_pipeline=2",
        ),
        (
            ["world.pipeline=2", "moe.dense_layers=1", "moe.dense_hidden=64"],
            r"moe\.dense_layers=1: the first of world\.pipeline=2 stages, whose last layer is number 0, would have no",
        ),
        (["world.pipeline=2", "memory.offload=true"], r"memory\.offload=true does not work with world\.pipeline=2"),
    ],
)  # fmt: skip
def test_what_does_not_divide_or_work_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SMOKE, words)


def test_ranks_and_micro_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"world\.pipeline=2 does not divide the number of ranks \(3\)"):
        resolve_world(load_config(SMOKE, ["world.pipeline=2"]), 3)
    odd = load_config(SMOKE, ["model.layers=4", "world.pipeline=2", "world.virtual_pipeline=2"])
    with pytest.raises(ConfigError, match=r"1 micro-batches a step are not divisible by world\.pipeline=2"):
        resolve_batch(odd, 2)
