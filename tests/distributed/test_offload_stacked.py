"""Three tiers, as on an accelerator, with a part of the CPU's memory in the place of the accelerator's.

So everything but streams and pinned memory is tried: what comes to the device, what goes no higher than the host.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_dist.memory import experts
from moe_dist.memory.arena import Account, Arena
from moe_dist.memory.block import Kind
from moe_dist.memory.experts import ExpertMemory
from moe_dist.memory.residency import Residency
from moe_dist.memory.streams import Transfers
from moe_dist.memory.tiers import Tiers
from tests.distributed.ranks import run_ranks
from tests.distributed.test_offload import Story, _assert_same, _story

pytestmark = pytest.mark.timeout(400)
CPU = torch.device("cpu")
HOST = 120_000
DEVICE = "memory.device_budget=25000"
"""A block of weights or of a gradient takes 11,264 bytes: two fit, of 28 on each of two ranks."""


class StackedTiers(Tiers):
    """A device over a host over the disk, both in the CPU's memory."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.below.arena.account.budget = HOST
        self.device = Residency(self.below, Arena(Account(self.budget, "device"), CPU), Transfers(CPU), args[3])


def _watched(call: Callable[..., Any]) -> Callable[..., Any]:
    """A way of reading or writing training state and weights, which must bring nothing to the device."""

    def watched(memory: ExpertMemory, *args: Any) -> Any:
        before = memory.device.bytes_in, memory.device.arena.account.in_use
        result = call(memory, *args)
        assert (memory.device.bytes_in, memory.device.arena.account.in_use) == before
        CALLS.append(args[2])
        return result

    return watched


CALLS: list[Kind] = []


def _stacked(axes: tuple[int, int, int], words: list[str], directory: Path) -> tuple[list[Story], list[Kind]]:
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
    ranks, batch, masters = (2, 1, set()) if precision == "float32" else (1, 8, {Kind.MASTER})
    words = [DEVICE, f"train.precision={precision}", f"train.micro_batch_size={batch}"]
    for stories, moved in run_ranks(_stacked, ranks, (1, ranks, 1), words, tmp_path, timeout=300):
        _assert_same([stories])
        assert set(moved) == {Kind.WEIGHT, Kind.EXP_AVG, Kind.EXP_AVG_SQ} | masters
