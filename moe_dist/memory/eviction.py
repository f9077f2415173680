"""Which blocks leave first: those said to be idle, then clusters few tokens choose, then by their last use."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.memory.block import Block

COLD = 0.25
"""A cluster with less than this part of an even share of its layer's rows is cold."""
DECAY = 0.9


@dataclass
class Use:
    """What is known of a resident block's use."""

    last: int = 0
    """When it was last used, on a clock that counts uses."""
    wanted: bool = False
    """Brought in ahead of its use, which is still to come."""
    idle: bool = False
    """Whoever used it last will not need it soon."""


class Activity:
    """Moving averages of the rows that stage one brings to each cluster."""

    def __init__(self, layers: int, clusters: int, cyclic: bool = False) -> None:
        """Args: cyclic: uses come round in the same order, so that what was used last is needed last."""
        self.cyclic = cyclic
        self._rows = [[0.0] * clusters for _ in range(layers)]  # plain numbers: they are asked for at every eviction

    def note(self, layer: int, local: int, rows: int) -> None:
        """Enters the rows that a cluster got in one pass."""
        self._rows[layer][local] = DECAY * self._rows[layer][local] + (1 - DECAY) * rows

    def is_cold(self, layer: int, local: int) -> bool:
        """Whether few tokens of its layer choose a cluster."""
        rows = self._rows[layer]
        return rows[local] * len(rows) < COLD * sum(rows)


def leaving_order(uses: Sequence[tuple[Block, Use]], activity: Activity | None) -> list[Block]:
    """Blocks in the order in which they should leave; those wanted soon come last of all."""
    newest_first = activity is not None and activity.cyclic

    def rank(pair: tuple[Block, Use]) -> tuple[bool, bool, bool, int]:
        block, use = pair
        cold = activity is not None and activity.is_cold(block.layer, block.local)
        return use.wanted, not use.idle, not cold, -use.last if newest_first else use.last

    return [block for block, _ in sorted(uses, key=rank)]
