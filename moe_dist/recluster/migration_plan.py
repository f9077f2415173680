"""Migration plan: a pure function from old and new placement to the runs of elements that must be sent.

Every rank holds equally many clusters and slots, so the tensors of all (block, shard) ranks have the same names and
sizes, and replicas with the same index own the same run of each. An expert's part of a stacked tensor is one run of its
flattened elements in every slot. The replica that sends each piece of that run follows from the runs that ranks own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from moe_dist.config import WorldShape
from moe_dist.distributed.mesh import Coordinates, rank_at
from moe_dist.distributed.placement import ExpertPlacement, Seat

Run = tuple[int, int]
"""Half-open range of elements of a flattened tensor: first element, and one past the last."""


class PieceKind(StrEnum):
    """Kind of a parameter's tensor: its weight, or a part of its optimizer state."""

    WEIGHT = "weight"
    MASTER = "master"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"


class TensorKey(NamedTuple):
    """Key of a tensor of a rank: layer, local cluster, parameter name and kind."""

    layer: int
    local: int
    name: str
    kind: PieceKind


@dataclass(frozen=True)
class Holdings:
    """Sizes and ownership of the tensors that every rank of a pipeline stage holds, the same on all of them.

    Attributes:
        residual_width: number of elements of one expert in each stacked parameter.
        base_width: number of elements of each base parameter.
        itemsize: bytes of an element, by kind.
        residual_runs, base_runs: run that each replica owns, by tensor key. Replicas of residuals are numbered along
            the data axis, those of a base along the data and shard axes.
        stage: pipeline stage of these ranks.
    """

    residual_width: Mapping[str, int]
    base_width: Mapping[str, int]
    itemsize: Mapping[PieceKind, int]
    residual_runs: Mapping[TensorKey, tuple[Run, ...]]
    base_runs: Mapping[TensorKey, tuple[Run, ...]]
    stage: int = 0


class Piece(NamedTuple):
    """Copy of `length` elements from `start` of a source tensor to `target_start` of a target tensor.

    Both starts are element indices of the whole parameter, also if a rank owns only a part of it.
    """

    expert: int
    """Expert to which the elements belong; -1: a cluster's base."""
    source_rank: int
    source: TensorKey
    start: int
    target_rank: int
    target: TensorKey
    target_start: int
    length: int


@dataclass(frozen=True)
class MigrationPlan:
    """All pieces of one migration, in the same order on all ranks."""

    pieces: tuple[Piece, ...]
    itemsize: Mapping[PieceKind, int]
    by_pair: dict[tuple[int, int], list[Piece]] = field(init=False)

    def __post_init__(self) -> None:
        by_pair: dict[tuple[int, int], list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda p: -self.itemsize[p.source.kind]):  # wide elements first: aligned
            by_pair.setdefault((piece.source_rank, piece.target_rank), []).append(piece)
        object.__setattr__(self, "by_pair", by_pair)

    def sends(self, rank: int) -> dict[int, list[Piece]]:
        """Return the pieces that a rank sends to others, by destination."""
        return {b: pieces for (a, b), pieces in sorted(self.by_pair.items()) if a == rank != b}

    def receives(self, rank: int) -> dict[int, list[Piece]]:
        """Return the pieces that a rank receives from others, by source."""
        return {a: pieces for (a, b), pieces in sorted(self.by_pair.items()) if b == rank != a}

    def stays(self, rank: int) -> list[Piece]:
        """Return the pieces that a rank copies to itself."""
        return self.by_pair.get((rank, rank), [])

    def bytes_between(self, source: int, target: int) -> int:
        """Return the bytes that one rank sends to another, or copies to itself if `source == target`."""
        return sum(piece.length * self.itemsize[piece.source.kind] for piece in self.by_pair.get((source, target), []))

    @property
    def bytes(self) -> int:
        """Bytes sent between different ranks."""
        return sum(self.bytes_between(a, b) for a, b in self.by_pair if a != b)


def plan_layer(
    layer: int, old: ExpertPlacement, new: ExpertPlacement, shape: WorldShape, holdings: Holdings
) -> Iterator[Piece]:
    """Yield the pieces that move every expert with a new location, and every base whose cluster changes its ranks."""
    before, after = old.seats(), new.seats()
    for expert, seat in before.items():
        if seat != after[expert]:
            yield from _expert_pieces(layer, expert, seat, after[expert], shape, holdings)
    for cluster in range(old.clusters):
        places = [(p.block_of_cluster[cluster], p.local_index(cluster)) for p in (old, new)]
        if places[0] != places[1]:
            yield from _base_pieces(layer, places[0], places[1], shape, holdings)


def _expert_pieces(
    layer: int, expert: int, seat: Seat, goal: Seat, shape: WorldShape, holdings: Holdings
) -> Iterator[Piece]:
    def rank_of(at: Seat) -> Callable[[int], int]:
        return lambda replica: rank_at(shape, Coordinates(replica, at.block, at.shard), holdings.stage)

    for name, width in holdings.residual_width.items():
        for kind in holdings.itemsize:
            source, target = TensorKey(layer, seat.local, name, kind), TensorKey(layer, goal.local, name, kind)
            route = _PieceRouter(
                expert, source, seat.slot * width, target, goal.slot * width, rank_of(seat), rank_of(goal)
            )
            yield from route.pieces(width, holdings.residual_runs)


def _base_pieces(
    layer: int, place: tuple[int, int], goal: tuple[int, int], shape: WorldShape, holdings: Holdings
) -> Iterator[Piece]:
    def rank_of(block: int) -> Callable[[int], int]:
        return lambda replica: rank_at(
            shape, Coordinates(replica // shape.shard, block, replica % shape.shard), holdings.stage
        )

    for name, width in holdings.base_width.items():
        for kind in holdings.itemsize:
            source, target = TensorKey(layer, place[1], name, kind), TensorKey(layer, goal[1], name, kind)
            route = _PieceRouter(-1, source, 0, target, 0, rank_of(place[0]), rank_of(goal[0]))
            yield from route.pieces(width, holdings.base_runs)


@dataclass(frozen=True)
class _PieceRouter:
    """Generator of the pieces between a position in a source tensor and one in a target tensor, for all replicas."""

    expert: int
    source: TensorKey
    start: int
    target: TensorKey
    target_start: int
    source_rank: Callable[[int], int]
    target_rank: Callable[[int], int]

    def pieces(self, width: int, runs: Mapping[TensorKey, tuple[Run, ...]]) -> Iterator[Piece]:
        for replica, wanted in enumerate(runs[self.target]):
            first, last = (min(max(end - self.target_start, 0), width) for end in wanted)
            for source, low, high in self._found(first, last, replica, runs[self.source]):
                yield Piece(
                    self.expert,
                    self.source_rank(source),
                    self.source,
                    self.start + low,
                    self.target_rank(replica),
                    self.target,
                    self.target_start + low,
                    high - low,
                )

    def _found(self, first: int, last: int, replica: int, owned: tuple[Run, ...]) -> Iterator[tuple[int, int, int]]:
        """Yield (replica, from, to) that together cover [first, last) of the width; the own replica is preferred."""
        preferred = sorted(range(len(owned)), key=lambda source: source != replica)
        while first < last:
            source = next(r for r in preferred if owned[r][0] <= self.start + first < owned[r][1])
            end = min(last, owned[source][1] - self.start)
            yield source, first, end
            first = end
