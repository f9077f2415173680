"""How evenly the routed copies fall on experts, clusters and ranks, step by step and over the whole run.

Shapes: L layers, E experts, H holders (the clusters, or the ranks that together hold all experts once).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_dist.config import MoEConfig, WorldShape
from moe_dist.metrics import LoadStatistics, load_statistics
from moe_dist.topology.placement import ExpertPlacement

Counts = npt.NDArray[np.float64]
LEVELS = ("expert", "cluster", "rank")


def experts_of_ranks(experts: int, shape: WorldShape, placement: ExpertPlacement | None) -> list[list[int]]:
    """The experts on each position (cluster block, shard) of the expert-parallel group, in the order of its ranks."""
    if placement is None:
        ranks = shape.cluster * shape.shard
        return np.arange(experts).reshape(ranks, -1).tolist()
    return [
        [expert for cluster in placement.clusters_of_block(block) for expert in placement.experts_of(cluster, shard)]
        for block in range(shape.cluster)
        for shard in range(shape.shard)
    ]


class LoadRecord:
    """The account of one run's loads; every rank keeps the same.

    A rank's load is that of its position in the expert-parallel group, summed over the `data` replicas.
    """

    def __init__(self, moe: MoEConfig, shape: WorldShape, layers: int, copies_per_step: int) -> None:
        """`copies_per_step`: tokens x layers x experts a token chooses, the base of the dropped share."""
        self._moe, self._shape, self._layers, self._copies = moe, shape, layers, copies_per_step
        self._steps: list[dict[str, Any]] = []
        self._since: dict[str, Counts] = {}
        self._since_steps = 0

    def add(self, count_LE: Counts, dropped: float, placements: Sequence[ExpertPlacement]) -> None:
        """Enters one step.

        Args:
            count_LE: copies routed to each expert, over all ranks.
            dropped: copies beyond the capacity, over all layers.
            placements: of each layer; empty: experts in their numbers' order (standard).
        """
        counts = self._by_holder(count_LE, placements)
        figures = {level: vars(load_statistics(counts_LH)) for level, counts_LH in counts.items()}
        self._steps.append({**figures.pop("expert"), "dropped": dropped / self._copies, **figures})
        for level, counts_LH in counts.items():
            self._since[level] = self._since.get(level, 0) + counts_LH
        self._since_steps += 1

    @property
    def latest(self) -> dict[str, Any]:
        """Balance of the last step: of the experts, and below `cluster` and `rank` of those."""
        return self._steps[-1]

    def take_line(self) -> dict[str, Any]:
        """A line of `load.jsonl`: the copies since the last line, by layer and holder, and the last step's balance."""
        counts = {f"{level}s": np.rint(self._since[level]).astype(int).tolist() for level in self._since}
        line = {"steps": self._since_steps, **counts, "load": self.latest}
        self._since, self._since_steps = {}, 0
        return line

    def last_fifth(self) -> dict[str, Any]:
        """Means over the last fifth of the steps; null for a dense model."""
        if not self._steps:
            return dict.fromkeys((*LoadStatistics.__dataclass_fields__, "dropped"))
        return _mean(self._steps[-max(1, len(self._steps) // 5) :])

    def _by_holder(self, count_LE: Counts, placements: Sequence[ExpertPlacement]) -> dict[str, Counts]:
        found = {"expert": count_LE}
        if placements:
            found["cluster"] = _summed(count_LE, [placement.members for placement in placements])
        layers: Sequence[ExpertPlacement | None] = placements or [None] * len(count_LE)
        ranks = [experts_of_ranks(self._moe.experts, self._shape, placement) for placement in layers]
        return {**found, "rank": _summed(count_LE, ranks)}


def _summed(count_LE: Counts, members: Sequence[Sequence[Sequence[int]]]) -> Counts:
    """Copies of each holder [L, H]; `members[l][h]` are a holder's experts."""
    return np.stack([count_E[np.array(held)].sum(axis=1) for count_E, held in zip(count_LE, members, strict=True)])


def _mean(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figure by figure; all trees have the same keys."""
    return {
        name: _mean([tree[name] for tree in trees]) if isinstance(value, dict) else _average(trees, name)
        for name, value in trees[0].items()
    }


def _average(trees: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([tree[name] for tree in trees]))
