"""Latent attention, leading dense layers and sigmoid scores in training: the same on any ranks, with regrouping."""

import json
from pathlib import Path

import pytest

from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE
from tests.unit.integrations.random_runs import LATENT

pytestmark = pytest.mark.timeout(300)
MIXED = [
    *LATENT, "model.layers=3", "moe.dense_layers=1", "moe.dense_hidden=24", "moe.score=sigmoid", "moe.clusters=4",
    "moe.balance_rate=0.001", "recluster.period=2", "recluster.start=2", "recluster.threshold=0",
]  # fmt: skip


def _train(folder: Path, *words: str) -> None:
    own = [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "tensorboard=false", "train.eval_every=0"]
    train(load_config(SMOKE, [*own, "corpus.max_bytes=100000", "train.steps=4", "moe.wire_dtype=float32", *words]))


def test_one_rank_and_two_train_alike(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        run_ranks(_train, ranks, tmp_path, f"name=on-{ranks}", *MIXED)
        run = tmp_path / "runs" / f"on-{ranks}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        loads = [json.loads(line) for line in (run / "load.jsonl").read_text().splitlines()]
        assert [len(line["experts"]) for line in loads] == [2] * 4, "a row for each layer of experts"
        found.append([line["train"]["loss"] for line in lines if "train" in line] + [summary["validation"]["loss"]])
        residual = 3 * 2 * (32 + 32) + 3 * 32 + 32
        assert summary["parameters"]["expert"] == 2 * (4 * 3 * 32 * 32 + 16 * residual)
        assert summary["recluster"]["rounds"] == 1
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    for words, match in (
        ([*LATENT, "world.context=2"], "world.context=2 does not work with model.latent"),
        ([*LATENT, "model.qk_norm=head"], "model.qk_norm=head does not work with model.latent"),
        (["moe.dense_layers=2"], "moe.dense_layers=2 leaves no layer of experts: must be < model.layers=2"),
        (["moe.dense_layers=1", "memory.offload=true"], "memory.offload=true does not work with moe.dense_layers=1"),
        (["moe.groups=4"], "moe.groups=4 works with moe.kind=standard only"),
        (["moe.kind=standard", "moe.groups=4", "moe.top_groups=5"], "moe.top_groups=5 of moe.groups=4"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_config(None, words)
