"""Decomposition of a new clustering into exchanges: cycles of experts, each of which takes the slot of the next.

A cycle does not change the size of any cluster, so any selection of cycles is a valid change. The coordinator can
therefore make only the best ones, or drop those that would raise the loss.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from moe_dist.distributed.placement import ExpertPlacement

Cycle = tuple[int, ...]
"""Experts of different clusters; each takes the slot of the next one, the last that of the first."""


def exchanges(old: Sequence[int], new: Sequence[int]) -> list[Cycle]:
    """Return the cycles that transform one balanced clustering into another; short cycles are preferred.

    Args:
        old, new: cluster of each expert, [E].

    Raises:
        ValueError: a cluster would change its size.
    """
    if len(old) != len(new) or sorted(old) != sorted(new):
        raise ValueError("exchanges need two clusterings of the same experts into clusters of the same sizes")
    remaining: dict[int, dict[int, list[int]]] = {}
    for expert, (a, b) in enumerate(zip(old, new, strict=True)):
        if a != b:
            remaining.setdefault(a, {}).setdefault(b, []).append(expert)
    cycles = []
    for expert, (a, b) in enumerate(zip(old, new, strict=True)):
        if expert in remaining.get(a, {}).get(b, []):
            _remove(remaining, a, b, expert)
            route = _shortest_path(remaining, b, a)
            cycles.append((expert, *(_remove(remaining, c, d, remaining[c][d][0]) for c, d in pairwise(route))))
    return sorted(cycles, key=len)


def successors(experts: int, cycles: Iterable[Cycle]) -> list[int]:
    """Return the cycles as one permutation: for each expert, the expert that takes its slot (itself if it stays)."""
    successor = list(range(experts))
    for cycle in cycles:
        for expert, slot_holder in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
            successor[slot_holder] = expert
    return successor


def cycles_of(successor: Sequence[int]) -> list[Cycle]:
    """Return the cycles of a permutation of `successors`, without experts that stay."""
    holder_of = {expert: slot_holder for slot_holder, expert in enumerate(successor)}
    cycles, seen = [], set[int]()
    for expert in range(len(successor)):
        cycle = []
        while expert not in seen:
            seen.add(expert)
            cycle.append(expert)
            expert = holder_of[expert]
        if len(cycle) > 1:
            cycles.append(tuple(cycle))
    return cycles


def apply_exchanges(placement: ExpertPlacement, cycles: Iterable[Cycle]) -> ExpertPlacement:
    """Return the next version of a placement, after disjoint cycles."""
    successor = successors(placement.experts, cycles)
    members = tuple(tuple(successor[expert] for expert in cluster) for cluster in placement.members)
    return replace(placement, members=members, version=placement.version + 1)


def _remove(remaining: dict[int, dict[int, list[int]]], a: int, b: int, expert: int) -> int:
    remaining[a][b].remove(expert)
    if not remaining[a][b]:
        del remaining[a][b]
    return expert


def _shortest_path(remaining: dict[int, dict[int, list[int]]], start: int, goal: int) -> list[int]:
    """Return the clusters on a shortest path along remaining moves; one exists, since cluster sizes do not change."""
    before: dict[int, int] = {}
    queue = deque([start])
    while goal not in before:
        here = queue.popleft()
        for there in remaining.get(here, {}):
            if there not in before:
                before[there] = here
                queue.append(there)
    route = [goal]
    while route[-1] != start:
        route.append(before[route[-1]])
    return route[::-1]
