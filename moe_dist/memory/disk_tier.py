"""Disk tier: one file per layer, with a checksum of each block that is verified at every read.

Files are read and written by plain system calls into and from the arena's buffers. Nothing is memory-mapped, so the
page cache does not count as this process's memory. Files are scratch: this process reads only what it has written, and
checkpoints hold the state that outlives it. Checksums are kept in memory.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import OffloadError
from moe_dist.memory.block import Block, BlockSize
from moe_dist.memory.owned_folder import OwnedFolder

PAGE = 4096


def _checksum(data: Any) -> int:
    import xxhash  # here, so that layers outside of a run do not need it

    return int(xxhash.xxh3_64_intdigest(data))


@dataclass
class _File:
    """File with the blocks of one layer."""

    name: str
    places: dict[Block, tuple[int, BlockSize]] = field(default_factory=dict)
    bytes: int = 0
    descriptor: int | None = None


class DiskTier:
    """Tier in a folder of its own; threads may read and write different blocks concurrently."""

    def __init__(self, folder: OwnedFolder, describe: Callable[[Block], str] = str) -> None:
        """Open the tier.

        Args:
            describe: returns the name of a block's cluster for errors.
        """
        self._folder, self._describe = folder, describe
        self._files: dict[int, _File] = {}
        self._digests: dict[Block, int] = {}
        self._opening = Lock()

    def register(self, block: Block, size: BlockSize) -> None:
        """Reserve page-aligned room for a block in the file of its layer."""
        file = self._files.setdefault(block.layer, _File(f"layer-{block.layer:03}.bin"))
        if block not in file.places:
            file.places[block] = file.bytes, size
            file.bytes += -(-size.bytes // PAGE) * PAGE

    def read(self, block: Block, into: Tensor) -> None:
        """Read a block and verify its checksum.

        Raises:
            OffloadError: the file is cut short, damaged, or cannot be read.
        """
        if block not in self._digests:
            into.zero_()
            return
        target = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        values = _bytes_of(target)
        file, offset = self._place(block)
        assert file.descriptor is not None
        done = 0
        while done < len(values):
            try:
                count = os.preadv(file.descriptor, [values[done:]], offset + done)
            except OSError as error:
                raise OffloadError(f"{self._name(file, block)} cannot be read: {error.strerror}") from error
            if not count:
                raise OffloadError(
                    f"{self._name(file, block)}: only {done:,} of {len(values):,} bytes are left: the file was cut "
                    "short; resume from the last checkpoint"
                )
            done += count
        if _checksum(values) != self._digests[block]:
            raise OffloadError(
                f"{self._name(file, block)} is damaged: its checksum is wrong; check the disk, and resume "
                "from the last checkpoint"
            )
        if target is not into:
            into.copy_(target)

    def write(self, block: Block, values: Tensor) -> None:
        """Write a block and remember its checksum.

        Raises:
            OffloadError: the disk is full or cannot be written.
        """
        data = _bytes_of(values if values.device.type == "cpu" else values.cpu())
        file, offset = self._place(block)
        done = 0
        try:
            descriptor = self._opened(file)
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            self._digests.pop(block, None)
            raise OffloadError(
                f"{self._name(file, block)} cannot be written ({file.bytes:,} bytes for the layer): {error.strerror}; "
                "give memory.directory a disk with more room"
            ) from error
        self._digests[block] = _checksum(data)

    def discard(self, block: Block) -> None:
        """Reset a block to zeros; its room stays reserved."""
        self._digests.pop(block, None)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            if file.descriptor is not None:
                os.close(file.descriptor)
                file.descriptor = None
                self._folder.remove(file.name)
        self._digests.clear()
        self._folder.close()

    def _opened(self, file: _File) -> int:
        """Return the layer's file, with disk space allocated for all of its blocks: a full disk shows at the start."""
        with self._opening:  # a second thread would open it again and truncate it
            if file.descriptor is None:
                file.descriptor = self._folder.open(file.name)
            if os.fstat(file.descriptor).st_size < file.bytes:
                os.posix_fallocate(file.descriptor, 0, file.bytes)
            return file.descriptor

    def _place(self, block: Block) -> tuple[_File, int]:
        file = self._files[block.layer]
        return file, file.places[block][0]

    def _name(self, file: _File, block: Block) -> str:
        return f"{self._folder.path / file.name}: {block.kind} of {self._describe(block)}"


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
