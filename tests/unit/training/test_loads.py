"""The account of loads: by expert, cluster and rank, step by step, since the last line, and over the run."""

import numpy as np
import pytest

from moe_dist.config import WorldShape
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.metrics import load_statistics
from moe_dist.training.load_metrics import LoadRecord, experts_of_ranks, last_fifth

SHAPE = WorldShape(1, 2, 2)
PLACED = ExpertPlacement(((7, 6, 5, 4), (3, 2, 1, 0)), (1, 0), 2, 2)


def test_experts_of_ranks_follow_the_placement() -> None:
    assert experts_of_ranks(8, SHAPE, PLACED) == [[3, 2], [1, 0], [7, 6], [5, 4]]
    assert experts_of_ranks(8, SHAPE, None) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_counts_are_summed_by_holder_and_between_lines() -> None:
    record = LoadRecord(8, SHAPE, 100)
    counts = np.arange(8.0)[None]
    record.add(counts, 5, [PLACED])
    record.add(10 * counts, 0, [PLACED])
    line = record.take_counts()
    assert line["steps"] == 2
    assert line["experts"] == [[11 * e for e in range(8)]]
    assert line["clusters"] == [[11 * 22, 11 * 6]]
    assert line["ranks"] == [[11 * 5, 11 * 1, 11 * 13, 11 * 9]]
    record.add(counts, 0, [PLACED])
    assert record.take_counts()["experts"] == counts.tolist()


def test_every_level_has_its_own_balance() -> None:
    record = LoadRecord(8, SHAPE, 100)
    counts = np.array([[4.0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2]])
    found = record.add(counts, 5, [PLACED, PLACED.with_members(((0, 4, 1, 5), (2, 6, 3, 7)))])
    assert {name: found[name] for name in ("variance", "cv2")} == {
        name: getattr(load_statistics(counts), name) for name in ("variance", "cv2")
    }
    assert found["cluster"]["max_over_mean"] == pytest.approx((2 + 1) / 2)
    assert found["rank"]["max_over_mean"] == pytest.approx((4 + 1) / 2)
    assert found["dropped"] == 0.05


def test_standard_experts_have_no_clusters() -> None:
    record = LoadRecord(8, SHAPE, 8)
    found = record.add(np.ones((1, 8)), 0, [])
    assert "clusters" not in record.take_counts()
    assert found["rank"]["max_over_mean"] == 1


def test_the_last_fifth_is_averaged_and_a_dense_model_has_none() -> None:
    record = LoadRecord(8, SHAPE, 8)
    assert set(last_fifth([]).values()) == {None}
    counts = [np.array([[8.0 * (step >= 8), 0, 0, 0, 0, 0, 0, 1]]) for step in range(10)]
    steps = [record.add(count_LE, float(step), [PLACED]) for step, count_LE in enumerate(counts)]
    assert last_fifth(steps)["dropped"] == pytest.approx(8.5 / 8)
    assert last_fifth(steps)["cluster"]["max_over_mean"] == pytest.approx(16 / 9)
