"""Divides a change of clusters into exchanges: closed cycles of experts, each taking the seat of the next.

A cycle keeps every cluster at its size, so that any selection of cycles is a valid change by itself. That is what
lets a coordinator take the best few, or drop those that would do harm.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from moe_dist.distributed.placement import ExpertPlacement

Cycle = tuple[int, ...]
"""Experts of different clusters; each takes the seat of the one after it, the last that of the first."""


def exchanges(old: Sequence[int], new: Sequence[int]) -> list[Cycle]:
    """The cycles that lead from one balanced clustering to another, short ones first where there is a choice.

    Args:
        old, new: the cluster of each expert, [E].

    Raises:
        ValueError: a cluster would change its size.
    """
    if len(old) != len(new) or sorted(old) != sorted(new):
        raise ValueError("exchanges need two clusterings of the same experts into clusters of the same sizes")
    waiting: dict[int, dict[int, list[int]]] = {}
    for expert, (a, b) in enumerate(zip(old, new, strict=True)):
        if a != b:
            waiting.setdefault(a, {}).setdefault(b, []).append(expert)
    cycles = []
    for expert, (a, b) in enumerate(zip(old, new, strict=True)):
        if expert in waiting.get(a, {}).get(b, []):
            _take(waiting, a, b, expert)
            route = _shortest(waiting, b, a)
            cycles.append((expert, *(_take(waiting, c, d, waiting[c][d][0]) for c, d in pairwise(route))))
    return sorted(cycles, key=len)


def successors(experts: int, cycles: Iterable[Cycle]) -> list[int]:
    """The cycles as one permutation: by expert, who takes its seat (itself where it stays)."""
    successor = list(range(experts))
    for cycle in cycles:
        for expert, seat_holder in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
            successor[seat_holder] = expert
    return successor


def cycles_of(successor: Sequence[int]) -> list[Cycle]:
    """The cycles of a permutation as `successors` gives it; who stays is in none."""
    holder_of = {expert: seat_holder for seat_holder, expert in enumerate(successor)}
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
    """The next version of a placement, after disjoint cycles."""
    successor = successors(placement.experts, cycles)
    members = tuple(tuple(successor[expert] for expert in cluster) for cluster in placement.members)
    return replace(placement, members=members, version=placement.version + 1)


def _take(waiting: dict[int, dict[int, list[int]]], a: int, b: int, expert: int) -> int:
    waiting[a][b].remove(expert)
    if not waiting[a][b]:
        del waiting[a][b]
    return expert


def _shortest(waiting: dict[int, dict[int, list[int]]], start: int, goal: int) -> list[int]:
    """Clusters on a shortest way along experts that still wait; there always is one, since sizes are kept."""
    before: dict[int, int] = {}
    queue = deque([start])
    while goal not in before:
        here = queue.popleft()
        for there in waiting.get(here, {}):
            if there not in before:
                before[there] = here
                queue.append(there)
    route = [goal]
    while route[-1] != start:
        route.append(before[route[-1]])
    return route[::-1]
