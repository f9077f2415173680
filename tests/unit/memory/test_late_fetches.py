"""What is fetched ahead for a device never brings up what the host's memory below it has been given anew."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.memory.arena import Account, Arena
from moe_dist.memory.block import Block
from moe_dist.memory.block_cache import BlockCache
from moe_dist.memory.copy_streams import Transfers
from tests.unit.memory.late_worker import LateWorker
from tests.unit.memory.test_tiers import BLOCKS, CPU, SIZE, cache_on_disk, values_of


def stacked(path: Path, on_device: int, on_host: int) -> tuple[BlockCache, BlockCache, LateWorker]:
    """A device over a host, and the thread that fetches for the device, which waits to be told."""
    host, worker = cache_on_disk(path, on_host), LateWorker()
    device = BlockCache(host, Arena(Account(on_device * SIZE.bytes, "device"), CPU), Transfers(CPU))
    device._worker = worker  # type: ignore[assignment]
    for block in BLOCKS:
        device.register(block, SIZE)
    return device, host, worker


@pytest.mark.parametrize("how", ["evict", "cancel_prefetch", "drop"])
def test_what_is_fetched_too_late_does_not_bring_up_what_is_being_replaced_below(tmp_path: Path, how: str) -> None:
    """A block that the device had, and was to have again, is updated in the host's memory before the thread's turn."""
    device, host, worker = stacked(tmp_path, 2, 3)
    device.write(BLOCKS[0], values_of(1))
    device.evict(BLOCKS[0])
    device.prefetch([BLOCKS[0]])
    getattr(device, how)(BLOCKS[0])
    with host.pinned(BLOCKS[0], changed=True) as values:
        worker.catch_up()
        values.fill_(2)
    assert not device.holds(BLOCKS[0])
    with device.pinned(BLOCKS[0]) as values:
        assert torch.equal(values, values_of(2))
    device.close()


def test_what_is_being_fetched_has_arrived_before_it_is_sent_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is in the middle of its copy when the host's memory is to be written: it is waited for."""
    host = cache_on_disk(tmp_path, 3)
    device = BlockCache(host, Arena(Account(2 * SIZE.bytes, "device"), CPU), Transfers(CPU))
    device.register(BLOCKS[0], SIZE)
    host.write(BLOCKS[0], values_of(1))
    read, begun, waited_for = host.read, threading.Event(), threading.Event()
    wait = device._condition.wait

    def slow_read(block: Block, into: Tensor) -> None:
        begun.set()
        waited_for.wait(60)
        read(block, into)

    def telling_wait(timeout: float | None = None) -> bool:
        waited_for.set()
        return wait(timeout)

    monkeypatch.setattr(host, "read", slow_read)
    monkeypatch.setattr(device._condition, "wait", telling_wait)
    device.prefetch([BLOCKS[0]])
    assert begun.wait(60)
    device.evict(BLOCKS[0])
    assert waited_for.is_set()
    host.write(BLOCKS[0], values_of(2))
    with device.pinned(BLOCKS[0]) as values:
        assert torch.equal(values, values_of(2))
    device.close()


STACKED_STEPS = st.tuples(
    st.sampled_from(BLOCKS[:3]), st.sampled_from(["use", "fetch", "cancel", "update", "drop", "hold", "late"])
)


@given(st.lists(STACKED_STEPS, max_size=30), st.integers(1, 3), st.integers(2, 3))
def test_stacked_blocks_read_as_they_were_left_however_late_fetches_are(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Block, str]], on_device: int, on_host: int
) -> None:
    """Against a dictionary: uses on the device, updates and drops in the host's memory, fetches at any time between."""
    device, host, worker = stacked(tmp_path_factory.mktemp("tier"), on_device, on_host)
    expected = dict.fromkeys(BLOCKS, 0)
    for number, (block, what) in enumerate(steps, 1):
        match what:
            case "use":
                with device.pinned(block, changed=True) as values:
                    assert torch.equal(values, values_of(expected[block]))
                    values.fill_(number)
                expected[block] = number
            case "fetch":
                device.prefetch([block])
            case "cancel":
                device.cancel_prefetch(block)
            case "update":
                device.evict(block)
                with host.pinned(block, changed=True) as values:
                    assert torch.equal(values, values_of(expected[block]))
                    worker.catch_up()
                    values.fill_(number)
                expected[block] = number
            case "drop":
                device.evict(block)
                host.drop(block)
                expected[block] = 0
            case "hold":
                with host.pinned(block):
                    worker.catch_up()
            case "late":
                worker.catch_up()
    for block, number in expected.items():
        with device.pinned(block) as values:
            assert torch.equal(values, values_of(number))
    device.close()
