"""Blocks survive their way through the tiers, within the budget; what goes wrong is one clear error."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.errors import OffloadError
from moe_dist.memory.arena import Account, Arena
from moe_dist.memory.block import ALIGN, Block, BlockLayout, BlockSize, TensorKind
from moe_dist.memory.block_cache import BlockCache
from moe_dist.memory.copy_streams import Transfers
from moe_dist.memory.disk_tier import DiskTier
from moe_dist.memory.eviction import Activity, Use, eviction_order
from moe_dist.memory.owned_folder import OwnedFolder

CPU = torch.device("cpu")
SIZE = BlockSize(1000, torch.float32)
BLOCKS = [
    Block(layer, local, kind)
    for layer in (0, 1)
    for local in (0, 1)
    for kind in (TensorKind.WEIGHT, TensorKind.GRADIENT)
]


def disk(path: Path) -> DiskTier:
    return DiskTier(OwnedFolder(path), lambda block: f"layer {block.layer}, cluster {block.local}")


def cache_on_disk(path: Path, blocks_at_once: int, activity: Activity | None = None) -> BlockCache:
    arena = Arena(Account(blocks_at_once * SIZE.bytes, "the test's memory"), CPU)
    tier = BlockCache(disk(path), arena, Transfers(CPU), activity)
    for block in BLOCKS:
        tier.register(block, SIZE)
    return tier


def values_of(number: int) -> Tensor:
    return torch.full((SIZE.elements,), float(number))


@given(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6), st.data())
def test_parameters_lie_apart_and_aligned(shapes: list[list[int]], data: st.DataObject) -> None:
    layout = BlockLayout.of({str(index): torch.Size(shape) for index, shape in enumerate(shapes)})
    flat = torch.zeros(layout.elements)
    for view in layout.views(flat).values():
        assert (view == 0).all()
        view.fill_(1)
    assert all(span.start % ALIGN == 0 for span in layout.spans.values())
    chosen = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    runs = list(layout.runs(chosen))
    assert [element for _, run in runs for element in range(run.start, run.stop)] == list(range(layout.elements))
    for choice, span in zip(chosen, layout.spans.values(), strict=True):
        assert [c for c, run in runs if run.start <= span.start and span.end <= run.stop] == [choice]


def test_the_account_refuses_what_exceeds_the_budget() -> None:
    account = Account(100, "memory of the test")
    account.reserve(60)
    with pytest.raises(OffloadError, match=r"memory of the test: 41 bytes more than the 60 in use .* budget of 100"):
        account.reserve(41)
    assert (account.in_use, account.peak) == (60, 60)
    with pytest.raises(OffloadError, match=r"budget of 5: raise memory.host_budget$"):
        Account(5, "the host's", "memory.host_budget").reserve(6)
    account.free(60)
    account.reserve(100)
    assert account.peak == 100


def test_idle_buffers_make_room_for_other_sizes() -> None:
    arena = Arena(Account(100, "memory"), CPU)
    arena.release(arena.allocate(60))
    assert arena.fits(100)
    arena.allocate(100)
    assert not arena.fits(1)


def test_cold_clusters_leave_first_then_the_least_recently_used() -> None:
    activity = Activity(1, 3)
    for local, rows in enumerate((100, 1, 100)):
        activity.note(0, local, rows)
    hot, cold, other = (Block(0, local, TensorKind.WEIGHT) for local in range(3))
    assert eviction_order([(hot, Use(1)), (cold, Use(3)), (other, Use(2))], activity) == [cold, hot, other]
    assert eviction_order([(hot, Use(1)), (cold, Use(3, prefetched=True)), (other, Use(2, idle=True))], activity) == [
        other,
        hot,
        cold,
    ]


STEPS = st.tuples(
    st.sampled_from(BLOCKS), st.sampled_from(["write", "read", "fetch", "zero_init", "drop", "down", "copy", "replace"])
)


@given(st.lists(STEPS, max_size=60), st.integers(1, 9))
def test_blocks_read_as_they_were_left(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Block, str]], room: int
) -> None:
    """Against a dictionary, whatever is evicted, fetched ahead or dropped between."""
    tier, expected = cache_on_disk(tmp_path_factory.mktemp("tier"), room), dict.fromkeys(BLOCKS, 0)
    for number, (block, what) in enumerate(steps, 1):
        match what:
            case "write":
                with tier.pinned(block, changed=True) as values:
                    assert torch.equal(values, values_of(expected[block]))
                    values.fill_(number)
                expected[block] = number
            case "read":
                with tier.pinned(block) as values:
                    assert torch.equal(values, values_of(expected[block]))
            case "fetch":
                tier.prefetch([block])
            case "zero_init":
                with tier.pinned(block, zero_init=True) as values:
                    expected[block] = int(values[0])  # what is here already is kept
            case "drop":
                tier.drop(block)
                expected[block] = 0
            case "down":
                tier.evict(block)
            case "copy":
                tier.read(block, copy := torch.empty(SIZE.elements))
                assert torch.equal(copy, values_of(expected[block]))
            case "replace":
                tier.write(block, values_of(number))
                expected[block] = number
        with tier._condition:  # what the account has let in is what there really is
            buffers = [resident.buffer for resident in tier._residents.values() if resident.buffer is not None]
            assert tier.arena.account.in_use == tier.arena._idle + SIZE.bytes * len(buffers) <= room * SIZE.bytes
    for block, number in expected.items():
        with tier.pinned(block) as values:
            assert torch.equal(values, values_of(number))
    tier.close()


def test_tiers_stack(tmp_path: Path) -> None:
    """As device -> host -> disk: both budgets hold, and values come back through both."""
    host = cache_on_disk(tmp_path, 3)
    device = BlockCache(host, Arena(Account(2 * SIZE.bytes, "device"), CPU), Transfers(CPU))
    for number, block in enumerate(BLOCKS, 1):
        device.register(block, SIZE)
        with device.pinned(block, changed=True) as values:
            values.fill_(number)
    for number, block in enumerate(BLOCKS, 1):
        with device.pinned(block) as values:
            assert torch.equal(values, values_of(number))
    assert (device.arena.account.peak, host.arena.account.peak) == (2 * SIZE.bytes, 3 * SIZE.bytes)
    assert device.bytes_in > 0
    assert host.bytes_out > 0
    device.close()


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    tier = cache_on_disk(tmp_path, 1)
    with tier.pinned(BLOCKS[0], changed=True):
        pass
    for block in (*BLOCKS[1:3], BLOCKS[0], BLOCKS[1]):
        with tier.pinned(block):
            pass
    assert tier.bytes_out == SIZE.bytes
    tier.close()


def test_blocks_in_use_stay_and_are_counted(tmp_path: Path) -> None:
    tier = cache_on_disk(tmp_path, 1)
    with (
        tier.pinned(BLOCKS[0]),
        pytest.raises(OffloadError, match=r"budget of 4,000: raise memory.device_budget_bytes"),
        tier.pinned(BLOCKS[1]),
    ):
        pass
    with tier.pinned(BLOCKS[1]):
        pass
    tier.close()


def written(path: Path) -> DiskTier:
    tier = disk(path)
    tier.register(BLOCKS[-1], SIZE)
    tier.write(BLOCKS[-1], values_of(1))
    return tier


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    tier = written(tmp_path)
    os.truncate(tmp_path / "layer-001.bin", 3000)
    with pytest.raises(
        OffloadError, match=r"layer-001.bin: gradient of layer 1, cluster 1: only 3,000 of 4,000 bytes are left"
    ):
        tier.read(BLOCKS[-1], torch.empty(SIZE.elements))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    tier = written(tmp_path)
    with (tmp_path / "layer-001.bin").open("r+b") as file:
        file.seek(1234)
        file.write(b"!")
    with pytest.raises(OffloadError, match=r"layer-001.bin: gradient of layer 1, cluster 1 is damaged: its checksum"):
        tier.read(BLOCKS[-1], torch.empty(SIZE.elements))


def test_reads_and_writes_in_parts_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:777]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:555], offset))
    tier, into = written(tmp_path), torch.empty(SIZE.elements)
    tier.read(BLOCKS[-1], into)
    assert torch.equal(into, values_of(1))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tier = disk(tmp_path)
    tier.register(BLOCKS[-1], SIZE)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        OffloadError,
        match=r"layer-001.bin: gradient of layer 1, cluster 1 cannot be written .*: No space left on device",
    ):
        tier.write(BLOCKS[-1], values_of(1))


def test_what_is_fetched_too_late_does_not_blank_what_has_been_used(tmp_path: Path) -> None:
    """The thread that fetches lags behind: the block has been filled and sent down before its generation comes."""
    tier, gate = cache_on_disk(tmp_path, 2), threading.Event()
    tier.prefetch([])
    assert tier._worker is not None
    tier._worker.submit(gate.wait)
    tier.prefetch([BLOCKS[0]], zero_init=True)
    with tier.pinned(BLOCKS[0], zero_init=True, changed=True) as values:
        values.fill_(7)
    tier.evict(BLOCKS[0])
    gate.set()
    tier._worker.submit(int).result()
    with tier.pinned(BLOCKS[0]) as values:
        assert torch.equal(values, values_of(7))
    tier.close()


def test_an_error_below_leaves_the_table_whole(tmp_path: Path) -> None:
    """What could not be fetched ahead says so when it is demanded, and other blocks go on."""
    tier = cache_on_disk(tmp_path, 1)
    tier.write(BLOCKS[-1], values_of(1))
    tier.evict(BLOCKS[-1])
    os.truncate(tmp_path / "layer-001.bin", 0)
    tier.prefetch([BLOCKS[-1]])
    with pytest.raises(OffloadError, match="cut short"):
        tier.acquire(BLOCKS[-1])
    with tier.pinned(BLOCKS[0]) as values:
        assert torch.equal(values, values_of(0))
    tier.close()


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator: the CPU is the only device")
def test_a_device_over_pinned_host_memory(tmp_path: Path) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    arena = Arena(Account(3 * SIZE.bytes, "host"), CPU, pinned=True)
    host = BlockCache(disk(tmp_path), arena, Transfers(CPU))
    above = BlockCache(host, Arena(Account(2 * SIZE.bytes, "device"), device), Transfers(device))
    for number, block in enumerate(BLOCKS, 1):
        above.register(block, SIZE)
        with above.pinned(block, changed=True) as values:
            values.fill_(number)
    for number, block in enumerate(BLOCKS, 1):
        above.prefetch([block])
        with above.pinned(block) as values:
            assert torch.equal(values.cpu(), values_of(number))
    above.close()


def test_two_threads_that_write_a_layer_first_open_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, both = [], threading.Barrier(2)
    really_open = OwnedFolder.open

    def slow_open(folder: OwnedFolder, name: str) -> int:
        opened.append(name)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # until the other thread is here too, if it can be
        return really_open(folder, name)

    monkeypatch.setattr(OwnedFolder, "open", slow_open)
    tier = disk(tmp_path / "disk")
    first, second = (block for block in BLOCKS if block.layer == 0 and block.kind is TensorKind.WEIGHT)
    for block in (first, second):
        tier.register(block, SIZE)
    threads = [
        threading.Thread(target=tier.write, args=(block, values_of(n))) for n, block in enumerate((first, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for number, block in enumerate((first, second)):
        into = torch.empty(SIZE.elements)
        tier.read(block, into)
        assert torch.equal(into, values_of(number))
    assert len(opened) == 1
    tier.close()


def test_the_peak_is_the_largest_use_so_far() -> None:
    account = Account(100, "memory")
    account.reserve(60)
    account.free(50)
    account.reserve(20)
    assert (account.in_use, account.peak) == (30, 60)


def test_a_dropped_block_reads_as_zeros_also_after_it_was_evicted(tmp_path: Path) -> None:
    tier = cache_on_disk(tmp_path, 2)
    tier.write(BLOCKS[0], values_of(5))
    tier.evict(BLOCKS[0])
    tier.drop(BLOCKS[0])
    with tier.pinned(BLOCKS[0]) as values:
        assert not values.any()
    tier.close()


def test_a_prefetch_evicts_no_block_that_was_prefetched_for_an_earlier_use(tmp_path: Path) -> None:
    tier = cache_on_disk(tmp_path, 2)
    tier.prefetch(BLOCKS[:3])
    assert tier._worker is not None
    tier._worker.submit(lambda: None).result()
    assert [tier.holds(block) for block in BLOCKS[:3]] == [True, True, False]
    tier.close()


def test_a_block_that_was_begun_with_zeros_stays_zero_though_nobody_wrote_to_it(tmp_path: Path) -> None:
    tier = cache_on_disk(tmp_path, 2)
    tier.write(BLOCKS[0], values_of(5))
    tier.evict(BLOCKS[0])
    with tier.pinned(BLOCKS[0], zero_init=True):
        pass
    tier.evict(BLOCKS[0])
    with tier.pinned(BLOCKS[0]) as values:
        assert not values.any()
    tier.close()
