"""Memory tiers of one rank, and their budgets.

An accelerator has three: its own memory, the host's (pinned), and the disk. A CPU has two: a budgeted part of its
memory, and the disk.
"""

from collections.abc import Callable
from contextlib import suppress
from math import ceil
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError
from moe_dist.memory.arena import Account, Arena
from moe_dist.memory.block import Block
from moe_dist.memory.block_cache import BlockCache
from moe_dist.memory.copy_streams import Transfers
from moe_dist.memory.disk_tier import DiskTier
from moe_dist.memory.eviction import Activity
from moe_dist.memory.owned_folder import OwnedFolder, folder_of, remove_other_ranks


class Tiers:
    """Tiers of one rank, as `memory.*` configures them.

    Attributes:
        budget: bytes of the device.
        device: cache on the device that computes.
        below: cache in host memory on an accelerator; on a CPU the device's own.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        device: torch.device,
        activity: Activity,
        describe: Callable[[Block], str],
    ) -> None:
        """Create the tiers.

        Args:
            activity: decides which blocks are evicted from the device.
            describe: returns the name of a block's cluster for errors.

        Raises:
            OffloadError: the directory is used by another run, or cannot be created.
        """
        self._options = config.memory
        self._directory = directory_of(config)
        disk = DiskTier(OwnedFolder(folder_of(self._directory, rank)), describe)
        if dist.is_initialized():
            remove_other_ranks(self._directory, dist.get_world_size())
        self.budget = budget_of(config)
        account = Account(self.budget, "memory of experts on the device")
        if device.type == "cpu":
            self.device = self.below = BlockCache(disk, Arena(account, device), Transfers(device), activity)
        else:
            host = Account(config.memory.host_budget, "memory of experts on the host", "memory.host_budget")
            cpu = torch.device("cpu")
            self.below = BlockCache(disk, Arena(host, cpu, pinned=True), Transfers(cpu), activity)
            self.device = BlockCache(self.below, Arena(account, device), Transfers(device), activity)

    def require_room(self, layer: int, device: int, host: int) -> None:
        """Reject budgets that are too small for a cluster of that layer.

        Args:
            device: bytes that its largest working set needs on the device.
            host: the same on the host; checked where the host is a tier.

        Raises:
            ConfigError: a budget is smaller.
        """
        if self.budget < device:
            given, least = f"bytes={self.budget}", f"{device}"
            if self._options.device_budget_bytes is None:
                ratio = self._options.device_budget_ratio
                given = f"ratio={ratio:g} ({self.budget:,} bytes)"
                least = f"{ceil(1000 * ratio * device / self.budget) / 1000:g}"
            raise ConfigError(
                f"memory.device_budget_{given} is less than the {device:,} bytes that one cluster needs (layer "
                f"{layer}): set it to {least} or more"
            )
        host_budget = None if self.below is self.device else self.below.arena.account.budget
        if host_budget is not None and host_budget < host:
            raise ConfigError(
                f"memory.host_budget={host_budget} is less than the {host:,} bytes of host memory that a cluster needs "
                f"(layer {layer}): set it to {host} or more"
            )

    def figures(self) -> dict[str, int]:
        """Return the bytes transferred since the start."""
        return {
            "budget_bytes": self.budget,
            "peak_device_bytes": self.device.arena.account.peak,
            "bytes_in": self.device.bytes_in,
            "bytes_out": self.device.bytes_out,
        }

    def totals(self, device: torch.device) -> dict[str, int]:
        """Return the bytes that all ranks transferred, and the largest peak of any device; collective."""
        figures = self.figures()
        largest = torch.tensor([figures["budget_bytes"], figures["peak_device_bytes"]], device=device)
        moved = torch.tensor([figures["bytes_in"], figures["bytes_out"]], device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(moved)
        return dict(zip(figures, [*largest.tolist(), *moved.tolist()], strict=True))

    def close(self) -> None:
        """Release all tiers and their files."""
        self.device.close()
        if self._options.directory is None:
            with suppress(OSError):  # other ranks' folders still exist
                self._directory.rmdir()
                self._directory.parent.rmdir()


def directory_of(config: RunConfig) -> Path:
    """Return the directory of a run's offload files, with one folder per rank."""
    chosen = config.memory.directory
    return Path(chosen) if chosen is not None else Path(config.runs_dir) / ".offload" / config.name


BYTES_PER_PARAMETER = 16
"""Bytes of a dense model under AdamW: weight, gradient, two moments, and in bfloat16 (2 + 2 + 8) a float32 master."""


def budget_of(config: RunConfig) -> int:
    """Return the device budget in bytes."""
    if config.memory.device_budget_bytes is not None:
        return config.memory.device_budget_bytes
    dense = config.model.layers * 3 * config.model.hidden_size * config.moe.dense_width
    return int(config.memory.device_budget_ratio * dense * BYTES_PER_PARAMETER)
