"""Traffic model: formulas for the bytes that each stage of the dispatch sends, equal to the counts of a run.

Everything follows from `rows_PP`, the rows that each rank of a group sends to each other rank. Vectors are sent to the
destination and back, in the forward and in the backward pass; routing data is sent with them; counts are exchanged
before them. A row that stays on its rank costs nothing. The planner and the simulator use these formulas;
`tests/distributed/test_traffic.py` compares them with the ledger, byte by byte.

Shapes: P ranks of a group, source by destination.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_dist.config import ModelConfig, MoEConfig, WorldShape
from moe_dist.config.byte_sizes import FLOAT32, INT32, INT64
from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage

Rows = npt.NDArray[np.float64]
WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def vector_bytes(hidden: int, wire_dtype: str) -> int:
    """Return the bytes of one hidden vector on the wire; int8 adds a scale per vector (`dispatch/wire_format.py`)."""
    return hidden * WIRE_BYTES[wire_dtype] + (FLOAT32 if wire_dtype == "int8" else 0)


@dataclass(frozen=True)
class HopCost:
    """Communication cost of one stage of the dispatch, in bytes.

    Attributes:
        hidden: size of one vector on the wire.
        counts: size of the counts that each rank sends to each other rank, once per micro-batch.
        there, back: size of the routing data sent with a row, and of that returned with its result.
        there_gradient: size of the gradient of `there`, returned in the backward pass; that of `back` has its size.
    """

    stage: Stage
    hidden: int
    counts: int
    there: int = 0
    there_gradient: int = 0
    back: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row that leaves its rank, both ways, in both passes."""
        return 4 * self.hidden + self.there + self.there_gradient + 2 * self.back

    def volumes(self, rows_PP: Rows) -> dict[tuple[Payload, Direction], Rows]:
        """Return the bytes that each rank sends to each other rank, for one micro-batch of one layer."""
        there = rows_PP - rows_PP * np.eye(rows_PP.shape[-1])  # without the rows that stay on their rank
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


def hop_costs(model: ModelConfig, moe: MoEConfig, shape: WorldShape) -> list[HopCost]:
    """Return the costs of the stages of one layer, in order, without those whose group is a single rank."""
    hidden = vector_bytes(model.hidden_size, moe.wire_dtype)
    found = []
    two_stages = moe.layer_kind.dispatch == "two_stage"
    if moe.layer_kind.dispatch == "flat" and shape.cluster * shape.shard > 1:
        found.append(flat_cost(model, moe, shape))
    if two_stages and shape.cluster > 1:
        found.append(_stage_one(hidden, moe, moe.clusters // shape.cluster))
    if two_stages and shape.shard > 1:
        gates = FLOAT32 * moe.top_k
        counts = INT64 * (moe.clusters // shape.cluster)  # each cluster of the block is dispatched separately
        slots = INT32 * moe.top_k  # slots have no gradient
        found.append(HopCost(Stage.TWO, hidden, counts, there=slots + gates, there_gradient=gates))
    return found


def flat_cost(model: ModelConfig, moe: MoEConfig, shape: WorldShape) -> HopCost:
    """Return the cost of flat routing over the ranks that together hold all experts once."""
    counts = INT64 * (moe.experts // (shape.cluster * shape.shard))
    return HopCost(Stage.FLAT, vector_bytes(model.hidden_size, moe.wire_dtype), counts)


def _stage_one(hidden: int, moe: MoEConfig, clusters: int) -> HopCost:
    """Return the cost of stage one; with several clusters per token, logits are sent and the log-mass is returned.

    Args:
        clusters: number of clusters of a block.
    """
    if moe.top_clusters == 1:
        return HopCost(Stage.ONE, hidden, counts=INT64 * clusters)
    logits = FLOAT32 * clusters
    return HopCost(Stage.ONE, hidden, counts=INT64, there=logits, there_gradient=logits, back=FLOAT32)


def ranks_of(stage: Stage, shape: WorldShape) -> int:
    """Return the number of ranks of a stage's group (P)."""
    return {Stage.ONE: shape.cluster, Stage.TWO: shape.shard, Stage.FLAT: shape.cluster * shape.shard}[stage]
