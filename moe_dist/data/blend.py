"""Order of the sources of a blend: which source gives the sequence at a position, and which of its draws it is.

Each position goes to the source that is furthest behind its share, ties to the first, as in Megatron-core's
`build_blending_indices`. Weights are whole numbers that sum to D, so the order repeats every D positions: a table of D
entries answers any position at once, whatever the run's length.

Shapes: K sources, D positions of a cycle, n positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

RESOLUTION = 1 << 16
"""Longest cycle. Weights that need a longer one are rounded to multiples of 1 / 65,536 of their sum."""


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the proportions of decimal weights, with a sum of at most `RESOLUTION`."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    sum_ = lcm(*(share.denominator for share in shares))
    if sum_ <= RESOLUTION:
        return tuple(int(share * sum_) for share in shares)
    whole = [max(int(share * RESOLUTION), int(share > 0)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (whole[k] - shares[k] * RESOLUTION, k))
    missing = RESOLUTION - sum(whole)
    for k in by_remainder[: max(missing, 0)]:
        whole[k] += 1
    whole[int(np.argmax(whole))] += min(missing, 0)  # sources of next to nothing got more than their share
    return tuple(whole)


@dataclass(frozen=True)
class Cycle:
    """Order of one cycle of fixed weights, which sum to D."""

    weight_K: tuple[int, ...]

    @cached_property
    def first_cycle(self) -> Indices:
        """Sources of the first cycle [D], which starts with the largest weight."""
        return self._order(1)

    @cached_property
    def later_cycle(self) -> Indices:
        """Sources of every later cycle [D], which starts with the first source, since all are even."""
        return self._order(0)

    def _order(self, head_start: int) -> Indices:
        length, behind_K = sum(self.weight_K), [weight * head_start for weight in self.weight_K]
        sources = [source for source, weight in enumerate(self.weight_K) if weight]
        source_D = np.empty(length, np.int64)
        for position in range(length):
            source_D[position] = chosen = max(sources, key=behind_K.__getitem__)  # the first of equals
            if not position and head_start:
                behind_K = [0] * len(behind_K)
            behind_K[chosen] -= length
            for source in sources:
                behind_K[source] += self.weight_K[source]
        return source_D

    @cached_property
    def _ranks(self) -> tuple[Indices, Indices]:
        """Number of the draw of each position within its cycle, [D] of the first and of later cycles."""
        ranks = []
        for source_D in (self.first_cycle, self.later_cycle):
            rank_D = np.empty_like(source_D)
            for source, weight in enumerate(self.weight_K):
                rank_D[source_D == source] = np.arange(weight)
            ranks.append(rank_D)
        return ranks[0], ranks[1]

    def locate(self, position_n: Indices) -> tuple[Indices, Indices]:
        """Return the source of each position, and how many of its draws come before it."""
        cycle_n, at_n = np.divmod(position_n, len(self.first_cycle))
        is_first = cycle_n == 0
        source_n = np.where(is_first, self.first_cycle[at_n], self.later_cycle[at_n])
        rank_n = np.where(is_first, self._ranks[0][at_n], self._ranks[1][at_n])
        return source_n, cycle_n * np.array(self.weight_K)[source_n] + rank_n

    def drawn(self, positions: int) -> tuple[int, ...]:
        """Return the draws of each source in the first `positions`, [K]."""
        cycles, rest = divmod(positions, len(self.first_cycle))
        partial_K = np.bincount((self.later_cycle if cycles else self.first_cycle)[:rest], minlength=len(self.weight_K))
        return tuple(cycles * weight + int(more) for weight, more in zip(self.weight_K, partial_K, strict=True))

    def position_of(self, source: int, draw: int) -> int:
        """Return the position of the draw number `draw` of a source."""
        cycles, rest = divmod(draw, self.weight_K[source])
        at = np.flatnonzero((self.later_cycle if cycles else self.first_cycle) == source)[rest]
        return cycles * len(self.first_cycle) + int(at)


@dataclass(frozen=True)
class Segment:
    """Positions from `first` on with the same weights, and the draws of each source before them, [K]."""

    first: int
    cycle: Cycle
    drawn_K: tuple[int, ...]


class BlendPlan:
    """Order of all sequences of a blend, with weights that change at given positions and sources that run out.

    Attributes:
        end: position at which all sources of positive weight have run out; None: never.
    """

    def __init__(self, changes: Sequence[tuple[int, Sequence[float]]], limit_K: Sequence[int | None]) -> None:
        """Lay out the segments.

        Args:
            changes: positions, ascending from 0, and the weights [K] from there on.
            limit_K: draws after which a source gives nothing more, and the others share its part; None: no limit.
        """
        self.segments: list[Segment] = []
        self.end: int | None = None
        self._limit_K = tuple(limit_K)
        drawn_K: tuple[int, ...] = (0,) * len(limit_K)
        ends = [position for position, _ in changes[1:]]
        for (first, weights), end in zip(changes, [*ends, None], strict=True):
            drawn_K = self._add(first, weights, end, drawn_K)
            if self.end is not None:
                break
        self._firsts = np.array([segment.first for segment in self.segments])

    def _add(self, first: int, weight_K: Sequence[float], end: int | None, drawn_K: tuple[int, ...]) -> tuple[int, ...]:
        """Add the segments of one change of weights: a new one begins where a source runs out; return the draws."""
        while end is None or first < end:
            limits = list(zip(weight_K, self._limit_K, drawn_K, strict=True))
            left_K = [0.0 if limit is not None and drawn >= limit else weight for weight, limit, drawn in limits]
            if not any(left_K):
                self.end = first
                break
            segment = Segment(first, Cycle(whole_weights(left_K)), drawn_K)
            self.segments.append(segment)
            stops = [] if end is None else [end]
            for source, (weight, limit, drawn) in enumerate(limits):
                if limit is not None and weight and drawn < limit:
                    stops.append(first + segment.cycle.position_of(source, limit - drawn - 1) + 1)
            if not stops:
                break
            first, drawn_K = min(stops), self._drawn(segment, min(stops))
        return drawn_K

    @staticmethod
    def _drawn(segment: Segment, position: int) -> tuple[int, ...]:
        more_K = segment.cycle.drawn(position - segment.first)
        return tuple(before + more for before, more in zip(segment.drawn_K, more_K, strict=True))

    def locate(self, position_n: Indices) -> tuple[Indices, Indices]:
        """Return the source of each position, and how many of its draws come before it."""
        segment_n = np.searchsorted(self._firsts, position_n, side="right") - 1
        source_n, draw_n = np.empty_like(position_n), np.empty_like(position_n)
        for number in np.unique(segment_n):
            inside, segment = segment_n == number, self.segments[number]
            sources, draws = segment.cycle.locate(position_n[inside] - segment.first)
            source_n[inside], draw_n[inside] = sources, draws + np.array(segment.drawn_K)[sources]
        return source_n, draw_n

    def drawn(self, position: int) -> tuple[int, ...]:
        """Return the draws of each source before a position, [K]."""
        return self._drawn(self._segment_at(position), position)

    def shares(self, position: int) -> tuple[float, ...]:
        """Return the share of each source in the sequences from a position on, [K]."""
        weight_K = self._segment_at(position).cycle.weight_K
        return tuple(weight / sum(weight_K) for weight in weight_K)

    def _segment_at(self, position: int) -> Segment:
        return self.segments[int(np.searchsorted(self._firsts, position, side="right")) - 1]
