"""What the hops of the dispatch put on the wire, as formulas: the counters of a run must come to the same.

Given `rows_PP`, the rows that each rank of a group sends to each, everything else follows: vectors go there and come
back, in the forward and in the backward pass; routing data travels with them; counts go ahead. A row that a rank keeps
costs nothing. The planner and the simulator compute with these formulas; `tests/distributed/test_traffic.py` holds them
against the ledger, byte by byte.

Shapes: P ranks of a group, source by destination.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_dist.config import ModelConfig, MoEConfig, WorldShape
from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage

Rows = npt.NDArray[np.float64]
INT64, INT32, FLOAT32 = 8, 4, 4
WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def vector_bytes(hidden: int, wire_dtype: str) -> int:
    """What one hidden vector takes on the wire; eight bits a number have a scale beside them (`dispatch/wire.py`)."""
    return hidden * WIRE_BYTES[wire_dtype] + (FLOAT32 if wire_dtype == "int8" else 0)


@dataclass(frozen=True)
class HopCost:
    """Sizes of what one hop carries, in bytes.

    Attributes:
        hidden: one vector on the wire.
        there, back: routing data that goes with a row, and that returns with its result.
        there_gradient: gradient of `there`, which returns in the backward pass; `back` has one of its own size.
        counts: what one rank tells each other one of a micro-batch beforehand.
    """

    stage: Stage
    hidden: int
    counts: int
    there: int = 0
    there_gradient: int = 0
    back: int = 0

    @property
    def row_bytes(self) -> int:
        """All that one row costs that does not stay, there and back, in both passes."""
        return 4 * self.hidden + self.there + self.there_gradient + 2 * self.back

    def volumes(self, rows_PP: Rows) -> dict[tuple[Payload, Direction], Rows]:
        """Bytes from each rank to each, for one micro-batch of one layer."""
        there = rows_PP - _diagonal(rows_PP)
        back = there.swapaxes(-1, -2)
        counts = np.broadcast_to(self.counts * (1.0 - np.eye(rows_PP.shape[-1])), rows_PP.shape)
        hidden = self.hidden * (there + back)
        return {
            (Payload.HIDDEN, Direction.FORWARD): hidden,
            (Payload.HIDDEN, Direction.BACKWARD): hidden,
            (Payload.ROUTING, Direction.FORWARD): self.there * there + self.back * back,
            (Payload.ROUTING, Direction.BACKWARD): self.there_gradient * back + self.back * there,
            (Payload.COUNTS, Direction.FORWARD): counts,
        }


def _diagonal(rows_PP: Rows) -> Rows:
    return rows_PP * np.eye(rows_PP.shape[-1])


def hop_costs(model: ModelConfig, moe: MoEConfig, shape: WorldShape) -> list[HopCost]:
    """The hops of one layer, in order; those whose group is one rank alone are left out."""
    hidden = vector_bytes(model.hidden_size, moe.wire_dtype)
    found = []
    two_stages = moe.layer_kind.dispatch == "two_stage"
    if moe.layer_kind.dispatch == "flat" and shape.cluster * shape.shard > 1:
        found.append(HopCost(Stage.FLAT, hidden, counts=INT64 * (moe.experts // (shape.cluster * shape.shard))))
    if two_stages and shape.cluster > 1:
        found.append(_stage_one(hidden, moe, moe.clusters // shape.cluster))
    if two_stages and shape.shard > 1:
        gates = FLOAT32 * moe.top_k
        counts = INT64 * (moe.clusters // shape.cluster)  # each cluster of the block makes this hop by itself
        slots = INT32 * moe.top_k  # which have no gradient
        found.append(HopCost(Stage.TWO, hidden, counts, there=slots + gates, there_gradient=gates))
    return found


def _stage_one(hidden: int, moe: MoEConfig, clusters: int) -> HopCost:
    """`clusters`: of a block. With several clusters a token their logits go along, and the log-mass returns."""
    if moe.top_clusters == 1:
        return HopCost(Stage.ONE, hidden, counts=INT64 * clusters)
    logits = FLOAT32 * clusters
    return HopCost(Stage.ONE, hidden, counts=INT64, there=logits, there_gradient=logits, back=FLOAT32)


def ranks_of(stage: Stage, shape: WorldShape) -> int:
    """P: how many ranks a hop's group has."""
    return {Stage.ONE: shape.cluster, Stage.TWO: shape.shard, Stage.FLAT: shape.cluster * shape.shard}[stage]
