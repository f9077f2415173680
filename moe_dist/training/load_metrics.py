"""Load metrics: the distribution of routed copies over experts, clusters and ranks, by step and over a run.

Shapes: L layers, E experts, H holders (the clusters, or the ranks that together hold all experts once).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_dist.config import WorldShape
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.metrics import LoadStatistics, load_statistics

Counts = npt.NDArray[np.float64]


def experts_of_ranks(experts: int, shape: WorldShape, placement: ExpertPlacement | None) -> list[list[int]]:
    """Return the experts of each rank (cluster block, shard) of the expert-parallel group."""
    if placement is None:
        ranks = shape.cluster * shape.shard
        return np.arange(experts).reshape(ranks, -1).tolist()
    return [
        [expert for cluster in placement.clusters_of_block(block) for expert in placement.experts_of(cluster, shard)]
        for block in range(shape.cluster)
        for shard in range(shape.shard)
    ]


class LoadRecord:
    """Load counts between two logged steps, the same on every rank.

    The load of a rank is that of its position in the expert-parallel group, summed over the `data` replicas.
    """

    def __init__(self, experts: int, shape: WorldShape, copies_per_step: int) -> None:
        """Start with empty counts.

        Args:
            copies_per_step: tokens x layers x chosen experts per token, the denominator of the dropped share.
        """
        self._experts, self._shape, self._copies = experts, shape, copies_per_step
        self._since: dict[str, Counts] = {}
        self._since_steps = 0

    @property
    def steps(self) -> int:
        """Number of steps since the counts were last taken."""
        return self._since_steps

    def add(self, count_LE: Counts, dropped: float, placements: Sequence[ExpertPlacement]) -> dict[str, Any]:
        """Add one step; return its load statistics: those of experts, and under `cluster` and `rank` those of holders.

        Args:
            count_LE: copies routed to each expert, over all ranks.
            dropped: copies dropped beyond the capacity, over all layers.
            placements: placement of each layer; empty: experts in numerical order (standard).
        """
        counts = self._by_holder(count_LE, placements)
        for level, counts_LH in counts.items():
            self._since[level] = self._since.get(level, 0) + counts_LH
        self._since_steps += 1
        figures = {level: vars(load_statistics(counts_LH)) for level, counts_LH in counts.items()}
        return {**figures.pop("expert"), "dropped": dropped / self._copies, **figures}

    def take_counts(self) -> dict[str, Any]:
        """Return the number of steps, and the copies by layer and holder, since the last call (for `load.jsonl`)."""
        counts = {f"{level}s": np.rint(self._since[level]).astype(int).tolist() for level in self._since}
        taken = {"steps": self._since_steps, **counts}
        self._since, self._since_steps = {}, 0
        return taken

    def _by_holder(self, count_LE: Counts, placements: Sequence[ExpertPlacement]) -> dict[str, Counts]:
        found = {"expert": count_LE}
        if placements:
            found["cluster"] = _summed(count_LE, [placement.members for placement in placements])
        layers: Sequence[ExpertPlacement | None] = placements or [None] * len(count_LE)
        ranks = [experts_of_ranks(self._experts, self._shape, placement) for placement in layers]
        return {**found, "rank": _summed(count_LE, ranks)}


def _summed(count_LE: Counts, members: Sequence[Sequence[Sequence[int]]]) -> Counts:
    """Sum the copies of each holder [L, H]; `members[l][h]` are the experts of a holder."""
    return np.stack([count_E[np.array(held)].sum(axis=1) for count_E, held in zip(count_LE, members, strict=True)])


def last_fifth(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of load statistics over the last fifth of the steps; None values for a dense model."""
    if not steps:
        return dict.fromkeys((*LoadStatistics.__dataclass_fields__, "dropped"))
    return _mean(steps[-max(1, len(steps) // 5) :])


def _mean(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average nested figures leaf by leaf; all trees have the same keys."""
    means: dict[str, Any] = {}
    for name, value in trees[0].items():
        values = [tree[name] for tree in trees]
        means[name] = _mean(values) if isinstance(value, dict) else float(np.mean(values))
    return means
