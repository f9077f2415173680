"""Matching of new clusters to old ones, so that as few experts as possible move."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Members = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Match:
    """New members by cluster and slot, for `ExpertPlacement.with_members`, and the experts that change cluster."""

    members: Members
    movers: tuple[int, ...]

    @property
    def moved(self) -> int:
        """Experts that change cluster."""
        return len(self.movers)


def match_clusters(old: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> Match:
    """Match each new group to an old cluster; experts that stay keep their slots, the others fill the free ones.

    The Hungarian method on the overlaps minimizes the number of moves.

    Args:
        old: present members by cluster and slot.
        groups: new clusters, in any order; equal in number and size to the old ones.

    Raises:
        ValueError: the new groups differ in experts, number or size from the old ones.
    """
    from scipy.optimize import linear_sum_assignment  # here, so that layers need no scipy

    everyone = [sorted(e for cluster in clusters for e in cluster) for clusters in (old, groups)]
    shapes = [sorted(map(len, clusters)) for clusters in (old, groups)]
    if everyone[0] != everyone[1] or shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
        raise ValueError(f"clusters of sizes {shapes[1]} cannot be matched to clusters of sizes {shapes[0]}")
    overlap = np.array([[len(set(before) & set(after)) for after in groups] for before in old])
    _, group_of = linear_sum_assignment(overlap, maximize=True)
    members = tuple(_keep_slots(before, groups[group]) for before, group in zip(old, group_of, strict=True))
    movers = [e for before, after in zip(old, members, strict=True) for e in set(after) - set(before)]
    return Match(members, tuple(sorted(movers)))


def _keep_slots(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    staying = set(before) & set(after)
    arriving = iter(sorted(set(after) - staying))
    return tuple(expert if expert in staying else next(arriving) for expert in before)
