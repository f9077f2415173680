"""Offloaded experts are refitted, and converted from standard ones, with the bits of experts in memory."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_dist.config import load_config
from moe_dist.memory.block_cache import BlockCache
from moe_dist.memory.saved_cluster import SavedCluster
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_migration import MOVES
from tests.distributed.test_offload import TIGHT, Story, _assert_same, _both, _final, _story
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(400)
REFIT = [TIGHT, "recluster.transition=refit"]
TWO_LEVELS = ["moe.base=shared+cluster", "moe.base_rank=4", "memory.device_budget_bytes=60000"]


def test_refits_and_relocations_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    variants = [
        [*REFIT, "world.zero_stage=1", "moe.top_clusters=2"],
        [*REFIT, "world.zero_stage=0", "memory.device_budget_bytes=120000", "train.precision=bfloat16",
         "train.micro_batch_size=8"],
    ]  # fmt: skip
    for stories in run_ranks(_both, 1, (1, 1, 1), variants, 9, tmp_path, timeout=300):
        _assert_same(stories)


@pytest.mark.parametrize("axes", [(1, 2, 1), (2, 1, 1), (1, 1, 2)], ids=str)
def test_ranks_that_share_or_repeat_experts_refit_the_same(axes: tuple[int, int, int], tmp_path: Path) -> None:
    """ZeRO 2 adds up micro-batches over replicas one by one: of one micro-batch the sums are the same."""
    variants = [[*REFIT, "world.zero_stage=1"], [*REFIT, "world.zero_stage=2", "train.micro_batch_size=4"]]
    for stories in run_ranks(_both, 2, axes, variants, 9, tmp_path, timeout=300):
        _assert_same(stories)


def test_two_level_bases_refit_the_same(tmp_path: Path) -> None:
    for stories in run_ranks(_both, 2, (1, 2, 1), [[*REFIT, *TWO_LEVELS]], 9, tmp_path, timeout=300):
        _assert_same(stories)


def _rejected(words: list[str], directory: Path | None) -> tuple[Story, int]:
    """Story in which the guard rejects every refit, and the number of copied clusters that were freed."""
    tried = "moe_dist.recluster.migration_executor.MigrationExecutor._loss_of"
    with (
        mock.patch(tried, side_effect=[1.0, *[2.0] * 99]),
        mock.patch.object(SavedCluster, "drop", autospec=True, side_effect=SavedCluster.drop) as dropped,
    ):
        return _story((1, 1, 1), [*words, "recluster.max_loss_increase=0"], 8, directory), dropped.call_count


def _both_rejected(directory: Path) -> list[tuple[Story, int]]:
    return [_rejected(REFIT, where) for where in (None, directory)]


def test_a_rejected_refit_leaves_no_trace(tmp_path: Path) -> None:
    ((in_memory, _), (offloaded, dropped)) = run_ranks(_both_rejected, 1, tmp_path, timeout=300)[0]
    _assert_same([[in_memory, offloaded]])
    assert dropped > len(MOVES)


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


WARM = ["moe.warmup_standard=0.5", "moe.wire_dtype=float32", "tensorboard=false", "train.steps=8", "checkpoint.every=3"]
AGAIN = ["recluster.period=1", "recluster.start=5", "recluster.transition=refit", "recluster.threshold=0",
         "recluster.max_loss_increase=1", "recluster.similarity=random"]  # fmt: skip
AWAY = ["memory.offload=true", "memory.device_budget_bytes=200000"]


def _summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["world.zero_stage=1"]),
        (2, ["world.cluster=2", "world.zero_stage=2"]),
        (2, ["world.data=2"]),
        (1, TWO_LEVELS[:2]),
    ],
)
def test_a_warm_up_and_what_follows_it_are_the_same_and_resume(tmp_path: Path, ranks: int, words: list[str]) -> None:
    """Standard experts are offloaded, converted and refitted; runs resume before and after, with and without tiers."""
    runs = tmp_path / "runs"
    common = [f"runs_dir={runs}", f"corpus.cache_dir={tmp_path}/cache", *WARM, *AGAIN, *words]
    stories = {
        "plain": [],
        "away": AWAY,
        "to-tiers": [*AWAY, f"checkpoint.resume={runs}/plain/checkpoints/step-00000003"],
        "to-memory": [f"checkpoint.resume={runs}/away/checkpoints/step-00000006"],
    }
    for name, more in stories.items():
        run_ranks(_train, ranks, [*common, f"name={name}", *more], timeout=200)
    expected = _final(runs / "plain")
    for name in stories:
        summary = _summary(runs / name)
        assert summary["validation"]["loss"] == _summary(runs / "plain")["validation"]["loss"], name
        assert summary["recluster"]["moved_experts"] > 0
        found = _final(runs / name)
        assert found.keys() == expected.keys()
        assert not [key for key, value in expected.items() if not torch.equal(found[key], value)], name
    offload = _summary(runs / "away")["memory"]["offload"]
    assert offload["bytes_in"] > 0
    assert offload["updates"] > offload["deferred_updates"]
    lines = [json.loads(line) for line in (runs / "away" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["offload"].keys() == offload.keys() for line in lines if "train" in line)
    loads = [json.loads(line) for line in (runs / "away" / "load.jsonl").read_text().splitlines()]
    assert [[len(row) for row in line["behind"]] for line in loads if line["step"] == 8] == [[4, 4]]


def _most_saved(directory: Path) -> tuple[int, int]:
    """Largest number of bytes that are pinned at once in a refit, and the bytes of a cluster's blocks."""
    pinned, most, acquire, release = 0, 0, BlockCache.acquire, BlockCache.release

    def counted(cache: BlockCache, block: Any, **options: Any) -> Any:
        nonlocal pinned, most
        values = acquire(cache, block, **options)
        pinned += values.nbytes
        most = max(most, pinned)
        return values

    def counted_release(cache: BlockCache, block: Any, **options: Any) -> None:
        nonlocal pinned
        values = cache._residents[block].values
        assert values is not None
        pinned -= values.nbytes
        release(cache, block, **options)

    with mock.patch.object(BlockCache, "acquire", counted), mock.patch.object(BlockCache, "release", counted_release):
        _story((1, 1, 1), REFIT, 8, directory)
    return most, 4 * 12_032


def test_a_refit_needs_no_more_of_the_budget_than_an_update(tmp_path: Path) -> None:
    most, cluster = run_ranks(_most_saved, 1, tmp_path, timeout=300)[0]
    assert most <= cluster
