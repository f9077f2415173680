"""Three tiers, as on an accelerator, with a part of the CPU's memory in the place of the accelerator's.

So everything but streams and pinned memory is tried: what comes to the device, what goes no higher than the host.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moe_dist.memory import expert_memory as experts
from moe_dist.memory.block import Block, TensorKind
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.memory.offloaded_cluster import OffloadedCluster
from tests.distributed.ranks import run_ranks
from tests.distributed.test_offload import Story, _assert_same, _story
from tests.unit.memory.stacked import LateTiers, StackedTiers

pytestmark = pytest.mark.timeout(400)
BUDGETS = ["memory.device_budget_bytes=25000", "memory.host_budget=120000"]
"""A block of weights or of a gradient takes 12,032 bytes: two fit on the device, of 28 on each of two ranks."""


def _watched(call: Callable[..., Any]) -> Callable[..., Any]:
    """A way of reading or writing training state and weights, which must bring nothing to the device."""

    def watched(memory: ExpertMemory, *args: Any) -> Any:
        before = memory.device.bytes_in, memory.device.arena.account.in_use
        result = call(memory, *args)
        assert (memory.device.bytes_in, memory.device.arena.account.in_use) == before
        CALLS.append(args[2])
        return result

    return watched


CALLS: list[TensorKind] = []


def _stacked(axes: tuple[int, int, int], words: list[str], directory: Path) -> tuple[list[Story], list[TensorKind]]:
    in_memory = _story(axes, words, 9, None)
    with (
        mock.patch.object(experts, "Tiers", StackedTiers),
        mock.patch.object(ExpertMemory, "read_run", _watched(ExpertMemory.read_run)),
        mock.patch.object(ExpertMemory, "write_run", _watched(ExpertMemory.write_run)),
    ):
        return [in_memory, _story(axes, words, 9, directory)], CALLS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_device_over_a_host_trains_the_same_and_what_migrates_never_comes_to_the_device(
    tmp_path: Path, precision: str
) -> None:
    """In bfloat16 on one rank: between ranks DeepSpeed adds up gradients in fewer bits than is done here."""
    ranks, batch, masters = (2, 1, set()) if precision == "float32" else (1, 8, {TensorKind.MASTER})
    words = [*BUDGETS, f"train.precision={precision}", f"train.micro_batch_size={batch}"]
    for stories, moved in run_ranks(_stacked, ranks, (1, ranks, 1), words, tmp_path, timeout=300):
        _assert_same([stories])
        assert set(moved) == {TensorKind.WEIGHT, TensorKind.EXP_AVG, TensorKind.EXP_AVG_SQ} | masters


LEAST = ["memory.device_budget_bytes=60160", "memory.host_budget=60160"]
"""Of the device: the weights of a layer's clusters and a gradient; of the host: the blocks of one, and one more."""


def _late(words: list[str], directory: Path) -> tuple[list[Story], set[Block], set[Block]]:
    """Stories in memory and in tiers; blocks that were fetched while they were written; weights that were skipped."""
    in_memory, late, skipped, skip = _story((1, 1, 1), words, 3, None), set(), set(), OffloadedCluster.skip

    class Tiers(LateTiers):
        def close(self) -> None:
            late.update(self.late)
            super().close()

    def noted_skip(cluster: OffloadedCluster) -> None:
        skipped.add(cluster.block(TensorKind.WEIGHT))
        skip(cluster)

    with mock.patch.object(experts, "Tiers", Tiers), mock.patch.object(OffloadedCluster, "skip", noted_skip):
        return [in_memory, _story((1, 1, 1), words, 3, directory)], late, skipped


def test_a_fetch_as_late_as_the_update_of_its_block_changes_nothing(tmp_path: Path) -> None:
    """What a recomputed layer asks for of the next one nobody uses before the update; nor what had no rows."""
    words = [*LEAST, "model.activation_checkpointing=true", "train.micro_batch_size=1"]
    stories, late, skipped = run_ranks(_late, 1, words, tmp_path)[0]
    _assert_same([stories])
    assert late
    assert late & skipped
