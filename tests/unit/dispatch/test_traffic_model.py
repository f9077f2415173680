"""Formulas of traffic on sizes that can be multiplied by hand."""

import numpy as np
import pytest

from moe_dist.config import ModelConfig, MoEConfig, WorldShape
from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage
from moe_dist.dispatch.traffic_model import HopCost, hop_costs, vector_bytes

MODEL = ModelConfig(hidden_size=64, heads=2, layers=1)
ROWS = np.array([[7.0, 2.0], [3.0, 9.0]])
"""Rank 0 keeps 7 rows and sends 2 to rank 1, which sends back 3 of its own and keeps 9."""


def _moe(**more: object) -> MoEConfig:
    sizes = {"experts": 16, "clusters": 8, "top_clusters": 2, "top_k": 2, "wire_dtype": "bfloat16"}
    return MoEConfig.model_validate({**sizes, **more})


def test_a_vector_has_the_bytes_of_its_type_and_eight_bits_a_scale_more() -> None:
    assert [vector_bytes(64, name) for name in ("float32", "bfloat16", "int8")] == [256, 128, 64 + 4]


def test_a_row_is_sent_there_and_back_in_both_passes() -> None:
    assert HopCost(Stage.ONE, hidden=100, counts=5).row_bytes == 400
    assert HopCost(Stage.ONE, 100, 5, there=10, there_gradient=7, back=3).row_bytes == 400 + 10 + 7 + 2 * 3


def test_bytes_of_each_payload_and_pass_by_source_and_destination() -> None:
    volumes = HopCost(Stage.ONE, 100, 5, there=10, there_gradient=7, back=3).volumes(ROWS)
    hidden = [[0, 500], [500, 0]]  # 2 + 3 rows cross, in either direction
    assert volumes[Payload.HIDDEN, Direction.FORWARD].tolist() == hidden
    assert volumes[Payload.HIDDEN, Direction.BACKWARD].tolist() == hidden
    assert volumes[Payload.ROUTING, Direction.FORWARD].tolist() == [[0, 10 * 2 + 3 * 3], [10 * 3 + 3 * 2, 0]]
    assert volumes[Payload.ROUTING, Direction.BACKWARD].tolist() == [[0, 7 * 3 + 3 * 2], [7 * 2 + 3 * 3, 0]]
    assert volumes[Payload.COUNTS, Direction.FORWARD].tolist() == [[0, 5], [5, 0]]
    assert len(volumes) == 5


@pytest.mark.parametrize(
    ("top_clusters", "shape", "expected"),
    [
        (1, WorldShape(1, 2, 1), [HopCost(Stage.ONE, 128, 8 * 4)]),
        (2, WorldShape(1, 2, 1), [HopCost(Stage.ONE, 128, 8, there=4 * 4, there_gradient=4 * 4, back=4)]),
        (1, WorldShape(1, 1, 2), [HopCost(Stage.TWO, 128, 8 * 8, there=8 + 8, there_gradient=8)]),
        (1, WorldShape(4, 1, 1), []),
    ],
)
def test_each_stage_of_a_layout_has_its_cost(top_clusters: int, shape: WorldShape, expected: list[HopCost]) -> None:
    assert hop_costs(MODEL, _moe(top_clusters=top_clusters), shape) == expected


def test_flat_routing_counts_the_experts_of_each_rank() -> None:
    found = hop_costs(MODEL, _moe(kind="standard"), WorldShape(1, 2, 2))
    assert found == [HopCost(Stage.FLAT, 128, 8 * 4)]
