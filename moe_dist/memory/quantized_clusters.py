"""Tiers of quantized clusters, for evaluation: each cluster is one block of bytes in every tier.

A block is loaded onto the device as bytes. It is dequantized there, one cluster at a time and outside of the budget.
Blocks are written only when a model is loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from moe_dist.config import RunConfig
from moe_dist.memory.block import Block, BlockSize, TensorKind
from moe_dist.memory.eviction import Activity
from moe_dist.memory.tiers import Tiers


class QuantizedClusterMemory:
    """Storage of this rank's quantized clusters.

    Attributes:
        describe: returns the name of a block's cluster for errors.
    """

    def __init__(self, config: RunConfig, clusters_per_layer: int, rank: int, device: torch.device) -> None:
        """Create the tiers.

        Raises:
            OffloadError: the directory is used by another run, or cannot be created.
        """
        self._per_layer, self._ahead = clusters_per_layer, config.memory.prefetch
        self._known: set[Block] = set()
        self.describe: Callable[[Block], str] = lambda b: f"layer {b.layer}, cluster index {b.local}"
        self._activity = Activity(config.moe_layers, clusters_per_layer, cyclic=True)
        self.tiers = Tiers(config, rank, device, self._activity, lambda block: self.describe(block))

    def adopt(self, layer: int, local: int, values: Tensor) -> "QuantizedBlock":
        """Store a cluster's bytes (uint8, one-dimensional), below an accelerator until their first use.

        Raises:
            ConfigError: a budget is smaller than one cluster.
            OffloadError: the disk is full.
        """
        self.tiers.require_room(layer, len(values), len(values))
        block = Block(layer, local, TensorKind.QUANTIZED)
        self._known.add(block)
        self.tiers.device.register(block, BlockSize(len(values), torch.uint8))
        with self.tiers.below.pinned(block, zero_init=True, changed=True) as flat:
            flat.copy_(values)
        return QuantizedBlock(self, block)

    @contextmanager
    def pinned(self, block: Block, rows: int) -> Iterator[Tensor]:
        """Load a cluster's bytes onto the device, for a pass with this number of rows, and prefetch the next ones."""
        self._use(block, rows)
        with self.tiers.device.pinned(block) as flat:
            yield flat

    def skip(self, block: Block) -> None:
        """Record a pass without rows for a cluster: its bytes are not loaded."""
        self._use(block, 0)
        self.tiers.device.cancel_prefetch(block)

    def _use(self, block: Block, rows: int) -> None:
        self._activity.note(block.layer, block.local, rows)
        first = block.layer * self._per_layer + block.local + 1
        following = (Block(*divmod(place, self._per_layer), block.kind) for place in range(first, first + self._ahead))
        self.tiers.device.prefetch([other for other in following if other in self._known])

    def close(self) -> None:
        """Release all tiers and their files."""
        self.tiers.close()


class QuantizedBlock:
    """One cluster's block in the memory of quantized clusters."""

    def __init__(self, memory: QuantizedClusterMemory, block: Block) -> None:
        self._memory, self._block = memory, block

    def pinned(self, rows: int) -> AbstractContextManager[Tensor]:
        """Load its bytes onto the device."""
        return self._memory.pinned(self._block, rows)

    def skip(self) -> None:
        """Record a pass that does not use it."""
        self._memory.skip(self._block)
