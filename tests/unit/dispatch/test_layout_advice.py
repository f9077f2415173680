"""Bytes of layouts beside flat routing: by hand, against routing that is drawn, and for all that is shipped."""

from pathlib import Path

import numpy as np
import pytest

from moe_dist.config import WorldShape, load_config, resolve_world
from moe_dist.dispatch.layout_advice import expected_bytes, flat_bytes, layout_advice

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = ["model.hidden_size=64", "moe.wire_dtype=bfloat16", "moe.experts=32", "moe.clusters=4", "moe.top_k=2"]


def _bytes(words: list[str], shape: WorldShape) -> tuple[float, float]:
    config = load_config(None, [*SMALL, *words])
    return expected_bytes(config.model, config.moe, shape), flat_bytes(config.model, config.moe, shape)


def test_one_cluster_a_token_is_half_of_flat_top_2() -> None:
    # 3 of 4 tokens leave their rank: 128 bytes there and back, in two passes
    assert _bytes([], WorldShape(1, 4, 1)) == pytest.approx((0.75 * 4 * 128, 2 * 0.75 * 4 * 128))
    assert _bytes([], WorldShape(2, 4, 1)) == _bytes([], WorldShape(1, 4, 1))
    assert _bytes([], WorldShape(4, 1, 1)) == (0, 0)


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 1), (1, 2, 2), (1, 4, 4)])
@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_expectation_is_the_mean_over_drawn_routing(shape: tuple[int, int, int], clusters: int) -> None:
    world, draw, tokens = WorldShape(*shape), np.random.default_rng(0), 20_000
    row, slots = 4 * 128, 4 * 2 + 4 * 2 + 4 * 2  # slots and gates there, gradients of gates back
    logits = 4 * (4 // world.cluster)
    routing = 0 if clusters == 1 else 2 * logits + 2 * 4
    total = 0.0
    for source in range(tokens):
        chosen = draw.permutation(4)[:clusters]
        blocks = {int(c) // (4 // world.cluster) for c in chosen}
        total += (row + routing) * len(blocks - {source % world.cluster})
        for _ in chosen:
            shards = {int(e) // (8 // world.shard) for e in draw.permutation(8)[:2]}
            total += (row + slots) * len(shards - {source % world.shard}) * (world.shard > 1)
    found, _ = _bytes([f"moe.top_clusters={clusters}"], world)
    assert found == pytest.approx(total / tokens, rel=0.03)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_no_shipped_configuration_sends_more_than_flat_routing(file: Path) -> None:
    config = load_config(file)
    if not config.moe.layer_kind.clustered:
        return
    world = config.world
    if world.cluster is None and config.moe.top_clusters > 1:
        return  # a preset: whoever uses it lays it out, and is told
    ranks = (world.data or 1) * (world.cluster or config.moe.clusters) * world.shard
    shape = resolve_world(config, ranks)
    sent, flat = expected_bytes(config.model, config.moe, shape), flat_bytes(config.model, config.moe, shape)
    assert layout_advice(config, shape) is None
    assert sent <= (0.55 if config.moe.top_clusters == 1 else 1) * flat


def test_a_layout_that_sends_more_is_told_with_one_that_does_not() -> None:
    config = load_config(None, [*SMALL, "moe.top_clusters=2", "world.shard=2", "world.shard_mode=experts"])
    advice = layout_advice(config, resolve_world(config, 8))
    assert advice is not None
    # two of four clusters: another rank of two has one of them with probability 5/6; 2 logits and a log-mass go along
    by_hand = 0.5 * 2 * (5 / 6) * (4 * 128 + 2 * 4 * 2 + 2 * 4) * 1.0
    assert advice.endswith(f"world.cluster=2 world.shard=1 sends {by_hand:,.0f}")
    assert "\n" not in advice
    replicated = load_config(None, [*SMALL, "moe.top_clusters=2", "world.shard=2", "world.cluster=2"])
    assert layout_advice(replicated, resolve_world(replicated, 8)) is None
