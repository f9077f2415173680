"""All-to-all bytes that runs really send in the layouts of four ranks, beside standard experts and the formulas."""

import json
from pathlib import Path

import pytest

from moe_dist.config import load_config, resolve_world
from moe_dist.dispatch.layout_advice import expected_bytes
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(300)
COMMON = ["tensorboard=false", "train.steps=4", "checkpoint.save_final=false", "moe.overlap_chunks=1"]
LAYOUTS = {
    "standard": ["moe.kind=standard"],
    "shard 1": ["world.cluster=4"],
    "shard 2": ["world.cluster=2", "world.shard=2"],
    "shard 4": ["world.cluster=1", "world.shard=4"],
    "two clusters": ["moe.top_clusters=2", "world.cluster=2", "world.shard=2"],
    "experts divided": ["world.cluster=2", "world.shard=2", "world.shard_mode=experts"],
}


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def test_layouts_send_as_little_as_the_formulas_say(tmp_path: Path) -> None:
    sent, predicted = {}, {}
    for name, layout in LAYOUTS.items():
        words = [*COMMON, *layout, f"runs_dir={tmp_path}/runs", f"corpus.cache_dir={tmp_path}/cache"]
        words.append(f"name={name.replace(' ', '-')}")
        run_ranks(_train, 4, words)
        summary = json.loads((tmp_path / "runs" / name.replace(" ", "-") / "summary.json").read_text())
        figures, config = summary["all_to_all"], load_config(SMOKE, words)
        counts = figures["bytes_by_payload"]["counts"] / figures["bytes"] if figures["bytes"] else 0
        sent[name] = figures["bytes_per_token_layer"] * (1 - counts)
        predicted[name] = expected_bytes(config.model, config.moe, resolve_world(config, 4))
    for name in LAYOUTS:
        assert sent[name] == pytest.approx(predicted[name], rel=0.1), name  # routing is not quite uniform at the start
    assert sent["shard 4"] == 0
    assert sent["shard 1"] <= 0.55 * sent["standard"]
    assert sent["shard 2"] <= 0.55 * sent["standard"]
    assert sent["two clusters"] <= sent["standard"]
    assert sent["experts divided"] > sent["shard 2"]
