"""Headline figures of a run's summary, each counted by hand."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage, TrafficLedger
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import Links
from moe_dist.training.summary_metrics import all_to_all_totals, memory_now, peak_memory, traffic_matrices

RANK = RankInfo(0, 2, torch.device("cpu"), timedelta(seconds=1))


@pytest.fixture
def ledger() -> TrafficLedger:
    """Rank 0 of three, of which the last is on another node: 700 bytes of vectors, 40 of routing, 8 of counts."""
    ledger = TrafficLedger(Links(0, (0, 0, 1)))
    for layer, stage, payload, direction, sizes in (
        (0, Stage.ONE, Payload.HIDDEN, Direction.FORWARD, [999, 100, 200]),
        (1, Stage.ONE, Payload.HIDDEN, Direction.BACKWARD, [999, 0, 400]),
        (1, Stage.TWO, Payload.ROUTING, Direction.FORWARD, [999, 40, 0]),
        (0, Stage.ONE, Payload.COUNTS, Direction.FORWARD, [8, 4, 4]),
    ):
        ledger.record(layer, stage, payload, direction, [0, 1, 2], sizes)
    return ledger


def test_bytes_of_all_ranks_are_divided_by_tokens_and_layers(
    ledger: TrafficLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks send as much as this one: 1,496 bytes over 11 tokens in each of 2 layers."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    found = all_to_all_totals(ledger, tokens=11, moe_layers=2, process=RANK)
    assert found["bytes"] == 2 * 748
    assert found["bytes_per_token_layer"] == 2 * 748 / 22, "68 bytes per token and layer"
    assert found["hidden_bytes_per_token_layer"] == 2 * 700 / 22
    assert found["bytes_inter_node"] == 2 * 604, "what goes to rank 2"
    assert found["messages"] == 2 * 6, "no empty message, and none to itself"
    assert found["bytes_by_payload"] == {"hidden": 1400, "routing": 80, "counts": 16}
    assert found["bytes_by_direction"] == {"forward": 2 * 348, "backward": 2 * 400}
    assert all_to_all_totals(ledger, 0, 2, RANK)["bytes_per_token_layer"] == 2 * 748, "no token: no division by zero"


def test_matrices_have_a_row_for_each_source_and_a_column_for_each_destination(
    ledger: TrafficLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks send ten and a hundred times as much."""

    def gather(rows: list[Tensor], mine: Tensor) -> None:
        for rank, row in enumerate(rows):
            row.copy_(mine * 10**rank)

    monkeypatch.setattr(dist, "all_gather", gather)
    process = RankInfo(0, 3, torch.device("cpu"), timedelta(seconds=1))
    found = traffic_matrices(ledger, process)
    assert found["node_of_rank"] == [0, 0, 1]
    assert list(found["stages"]) == ["one", "two"], "a stage without messages is left out"
    assert found["stages"]["one"]["bytes"] == [[0, 104 * n, 604 * n] for n in (1, 10, 100)]
    assert found["stages"]["two"]["bytes"] == [[0, 40 * n, 0] for n in (1, 10, 100)]
    assert found["stages"]["one"]["messages"][0] == [0, 2, 3]


def test_memory_is_the_largest_and_the_smallest_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank uses 70 bytes, this one 50."""
    monkeypatch.setattr("moe_dist.training.summary_metrics.rss_bytes", lambda: 50)
    monkeypatch.setattr("moe_dist.training.summary_metrics.peak_rss_bytes", lambda: 60)

    def all_reduce(tensor: Tensor, op: object) -> None:
        assert op is dist.ReduceOp.MAX
        tensor.copy_(torch.maximum(tensor, torch.tensor([70, -70, 3])))

    def gather(rows: list[Tensor], mine: Tensor) -> None:
        rows[0].copy_(mine)
        rows[1].copy_(torch.tensor([90, 4]))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather", gather)
    assert memory_now(RANK) == {"rss_bytes_max": 70, "rss_bytes_min": 50, "device_bytes_max": 3}
    peaks = peak_memory(RANK)
    assert (peaks.rss_by_rank, peaks.device) == ([60, 90], 4)
