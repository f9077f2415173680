"""Eviction order: idle blocks, then blocks of clusters with few tokens, then least recently used."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.memory.block import Block

COLD = 0.25
"""Share of a uniform load below which a cluster is cold."""
DECAY = 0.9


@dataclass
class Use:
    """Usage of a cached block."""

    last: int = 0
    """Time of the last use, on a clock that counts uses."""
    prefetched: bool = False
    """True if the block was prefetched and not used yet."""
    idle: bool = False
    """True if the last user will not need the block soon."""


class Activity:
    """Moving averages of the rows that each cluster receives."""

    def __init__(self, layers: int, clusters: int, cyclic: bool = False) -> None:
        """Start with no rows.

        Args:
            cyclic: blocks are used in the same order in every step, so the most recently used one is needed last.
        """
        self.cyclic = cyclic
        self._rows = [[0.0] * clusters for _ in range(layers)]  # plain numbers: read at every eviction

    def note(self, layer: int, local: int, rows: int) -> None:
        """Record the rows of a cluster in one pass."""
        self._rows[layer][local] = DECAY * self._rows[layer][local] + (1 - DECAY) * rows

    def is_cold(self, layer: int, local: int) -> bool:
        """Return True if a cluster receives few of its layer's tokens."""
        rows = self._rows[layer]
        return rows[local] * len(rows) < COLD * sum(rows)


def eviction_order(uses: Sequence[tuple[Block, Use]], activity: Activity | None) -> list[Block]:
    """Return blocks in eviction order; prefetched ones come last."""
    newest_first = activity is not None and activity.cyclic

    def rank(pair: tuple[Block, Use]) -> tuple[bool, bool, bool, int]:
        block, use = pair
        cold = activity is not None and activity.is_cold(block.layer, block.local)
        return use.prefetched, not use.idle, not cold, -use.last if newest_first else use.last

    return [block for block, _ in sorted(uses, key=rank)]
