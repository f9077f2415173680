"""Write-back cache of blocks in an arena over a lower tier.

A block is *acquired* for use, which loads it, and *released*; in between it is pinned. Blocks that are not pinned are
evicted when room is needed, in the order of `eviction.py`, and written to the lower tier only if they have changed. A
thread prefetches the blocks that are announced, and evicts for them. A cache is itself a tier, so that device -> host
-> disk are two caches over a `DiskTier`.

A prefetch is cancelled if its block was acquired, evicted or dropped, or the prefetch itself cancelled, since it was
requested: a late one must not load a block that is being written to the lower tier. One that has begun is waited for.
So, from `evict` to the next `acquire` or `prefetch`, the cache does not touch the block, and its owner may write the
lower tier.

Locking: one condition guards the table of entries. While a block is read or written it is *busy* and the lock is not
held. Only `acquire` waits for room; a prefetch without room is dropped, so that the two cannot deadlock.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition

from torch import Tensor

from moe_dist.errors import OffloadError
from moe_dist.memory.arena import Arena
from moe_dist.memory.block import Block, BlockSize, Tier
from moe_dist.memory.copy_streams import Transfers
from moe_dist.memory.eviction import Activity, Use, eviction_order


@dataclass
class _Resident:
    """Entry of a block in the arena."""

    buffer: Tensor | None = None
    values: Tensor | None = None
    pins: int = 0
    changed: bool = False
    busy: bool = True
    use: Use = field(default_factory=Use)


class BlockCache:
    """Cache of blocks in a budgeted arena over a lower tier."""

    def __init__(self, below: Tier, arena: Arena, transfers: Transfers, activity: Activity | None = None) -> None:
        self.arena, self._below, self._activity, self._transfers = arena, below, activity, transfers
        self._sizes: dict[Block, BlockSize] = {}
        self._residents: dict[Block, _Resident] = {}
        self._condition = Condition()
        self._clock = 0
        self._generations: Counter[Block] = Counter()  # prefetches of an earlier generation are cancelled
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: list[Future[None]] = []
        self.bytes_in = self.bytes_out = 0

    def register(self, block: Block, size: BlockSize) -> None:
        """Declare a block, here and in the lower tier."""
        self._sizes[block] = size
        self._below.register(block, size)

    def acquire(self, block: Block, *, zero_init: bool = False) -> Tensor:
        """Pin a block and return its values, one-dimensional; may be nested.

        Args:
            zero_init: initialize with zeros instead of reading the lower tier, if the block is not cached.

        Raises:
            OffloadError: blocks in use leave no room, or the lower tier fails.
        """
        with self._condition:
            found = self._idle_entry(block)
            resident = self._new_entry(block) if found is None else found
            resident.pins += 1
        if found is None:
            self._load(block, resident, zero_init, demanded=True)
        with self._condition:
            self._clock += 1
            resident.use = Use(self._clock)
        assert resident.values is not None
        self._transfers.wait_for(resident.values)
        return resident.values

    def release(self, block: Block, *, changed: bool = False, idle: bool = False) -> None:
        """Unpin a block.

        Args:
            changed: the values have been written to.
            idle: the block will not be needed soon.
        """
        with self._condition:
            resident = self._residents[block]
            assert resident.pins, f"{block} is released more often than it was acquired"
            resident.pins -= 1
            resident.changed |= changed
            resident.use.idle = idle
            self._condition.notify_all()

    @contextmanager
    def pinned(
        self, block: Block, *, changed: bool = False, idle: bool = False, zero_init: bool = False
    ) -> Iterator[Tensor]:
        """Pin the block for the length of a `with`."""
        values = self.acquire(block, zero_init=zero_init)
        try:
            yield values
        finally:
            self.release(block, changed=changed, idle=idle)

    def prefetch(self, blocks: Sequence[Block], *, zero_init: bool = False) -> None:
        """Start to load blocks as far as there is room; errors are raised by `acquire`."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._ahead = [future for future in self._ahead if not future.done()]
        for block in blocks:
            with self._condition:
                resident = self._residents.get(block)
                if resident is not None:
                    resident.use.prefetched = True
                    continue
                generation = self._generations[block]
            self._ahead.append(self._worker.submit(self._prefetch, block, zero_init, generation))

    def cancel_prefetch(self, block: Block) -> None:
        """A block that was fetched ahead will not be used after all."""
        with self._condition:
            self._generations[block] += 1
            if (resident := self._residents.get(block)) is not None:
                resident.use.prefetched = False

    def drop(self, block: Block) -> None:
        """Forget a block that is not in use, here and in the lower tier: it reads as zeros."""
        with self._condition:
            if (resident := self._idle_entry(block)) is not None:
                self._require_unused(block, resident)
                self._remove(block, resident)
        self._below.discard(block)

    discard = drop

    def evict(self, block: Block) -> None:
        """Lets a block that nobody uses leave now; it stays away until it is asked for again."""
        with self._condition:
            if (resident := self._idle_entry(block)) is not None:
                self._require_unused(block, resident)
                self._write_back(block, resident)

    def read(self, block: Block, into: Tensor) -> None:
        """Copy a block into `into` (as a tier), past the arena unless it is cached."""
        if self.holds(block):
            with self.pinned(block) as values:
                into.copy_(values)
        else:
            self._below.read(block, into)

    def write(self, block: Block, values: Tensor) -> None:
        """Replace a block (as a tier), in the arena."""
        resident = self.acquire(block, zero_init=True)
        resident.copy_(values)
        self.release(block, changed=True)

    def holds(self, block: Block) -> bool:
        """Return True if a block is cached or being loaded."""
        with self._condition:
            return block in self._residents

    def close(self) -> None:
        """Forget everything, here and in the lower tier."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
        self._residents.clear()
        self._below.close()

    def _idle_entry(self, block: Block) -> _Resident | None:
        """Cancel prefetches of a block, wait for a copy in progress, and return its entry, if any."""
        self._generations[block] += 1
        while (resident := self._residents.get(block)) is not None and resident.busy:
            self._condition.wait()
        return resident

    def _new_entry(self, block: Block) -> _Resident:
        resident = self._residents[block] = _Resident()
        return resident

    def _load(self, block: Block, resident: _Resident, zero_init: bool, demanded: bool) -> bool:
        """Allocate and load a block whose entry exists; return False if a prefetch found no room."""
        size = self._sizes[block]
        try:
            with self._condition:
                if not self._make_room(size.bytes, demanded):
                    self._residents.pop(block)
                    return False
                resident.buffer = self.arena.allocate(size.bytes)
                resident.values = resident.buffer.view(size.dtype)
            if zero_init:
                self._below.discard(block)
                resident.values.zero_()
            else:
                with self._transfers.side_stream(resident.values):
                    self._below.read(block, resident.values)
        except BaseException:
            with self._condition:
                self._remove(block, resident)
            raise
        finally:
            with self._condition:
                resident.busy = False
                self._condition.notify_all()
        with self._condition:
            self.bytes_in += 0 if zero_init else size.bytes
        return True

    def _make_room(self, size: int, demanded: bool) -> bool:
        while not self.arena.fits(size):
            victim = self._next_victim(demanded)
            if victim is not None:
                self._write_back(victim, self._residents[victim])
            elif not demanded:
                return False
            elif any(resident.busy and resident.values is not None for resident in self._residents.values()):
                self._condition.wait()
            else:
                self.arena.account.reserve(size)  # raises
                raise AssertionError("the account accepted more than its budget")
        return True

    def _next_victim(self, demanded: bool) -> Block | None:
        entries = self._residents.items()
        free = [(block, entry.use) for block, entry in entries if not entry.pins and not entry.busy]
        order = eviction_order([pair for pair in free if demanded or not pair[1].prefetched], self._activity)
        return order[0] if order else None

    @staticmethod
    def _require_unused(block: Block, resident: _Resident) -> None:
        if resident.pins:
            raise RuntimeError(f"{block} is in use and cannot be evicted")

    def _write_back(self, block: Block, resident: _Resident) -> None:
        """Write a changed block to the lower tier, without the lock, and remove it."""
        assert resident.values is not None
        if resident.changed:
            resident.busy = True
            self._condition.release()
            try:
                with self._transfers.side_stream(resident.values, wait=True):
                    self._below.write(block, resident.values)
            finally:
                self._condition.acquire()
                self.bytes_out += self._sizes[block].bytes
                resident.busy = False
                self._condition.notify_all()
        self._remove(block, resident)

    def _remove(self, block: Block, resident: _Resident) -> None:
        if self._residents.get(block) is resident:
            del self._residents[block]
        if resident.buffer is not None:
            self.arena.release(resident.buffer)
            resident.buffer = resident.values = None
        self._condition.notify_all()

    def _prefetch(self, block: Block, zero_init: bool, generation: int) -> None:
        with self._condition:
            if self._generations[block] != generation:
                return  # cancelled: the lower tier may be writing the block
            if block in self._residents:
                self._residents[block].use.prefetched = True
                return
            resident = self._new_entry(block)
            resident.use = Use(self._clock, prefetched=True)
        try:
            self._load(block, resident, zero_init, demanded=False)
        except OffloadError:
            return  # `acquire` meets the same error and raises it
