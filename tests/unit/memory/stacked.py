"""Three tiers, as on an accelerator, with a part of the CPU's memory in the place of the accelerator's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_dist.memory.arena import Account, Arena
from moe_dist.memory.block import Block
from moe_dist.memory.block_cache import BlockCache
from moe_dist.memory.copy_streams import Transfers
from moe_dist.memory.tiers import Tiers
from tests.unit.memory.late_worker import LateWorker

CPU = torch.device("cpu")


class StackedTiers(Tiers):
    """A device over a host over the disk, both in the CPU's memory."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.below.arena.account = Account(args[0].memory.host_budget, "host", "memory.host_budget")
        self.device = BlockCache(self.below, Arena(Account(self.budget, "device"), CPU), Transfers(CPU), args[3])


class LateTiers(StackedTiers):
    """What is fetched for the device comes as late as can be: while its block is being written in the host's memory."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        worker, pinned = LateWorker(), self.below.pinned
        self.device._worker = worker  # type: ignore[assignment]

        @contextmanager
        def pinned_when_a_prefetch_comes(block: Block, *, changed: bool = False, **how: bool) -> Iterator[Tensor]:
            with pinned(block, changed=changed, **how) as values:
                if changed:
                    worker.catch_up(block)
                yield values

        self.below.pinned = pinned_when_a_prefetch_comes  # type: ignore[method-assign]
        self.late = worker.done
