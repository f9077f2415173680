"""Figures of a clustering against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.clustering import adjusted_rand_index, cluster_quality

labellings = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("first", "second", "index"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 8 / 33),
        ([5, 5, 5], [7, 7, 7], 1.0),
        ([0, 1, 2], [2, 1, 0], 1.0),
        ([0], [3], 1.0),
    ],
)
def test_adjusted_rand_index_of_known_cases(first: list[int], second: list[int], index: float) -> None:
    assert adjusted_rand_index(first, second) == pytest.approx(index, abs=1e-12)


@given(labels=labellings, names=st.permutations(range(4)))
def test_adjusted_rand_index_is_symmetric_and_blind_to_names(labels: list[tuple[int, int]], names: list[int]) -> None:
    first, second = [a for a, _ in labels], [b for _, b in labels]
    index = adjusted_rand_index(first, second)
    assert adjusted_rand_index(second, first) == pytest.approx(index, abs=1e-12)
    assert adjusted_rand_index([names[a] for a in first], second) == pytest.approx(index, abs=1e-12)
    assert adjusted_rand_index(first, first) == 1


def test_adjusted_rand_index_is_zero_by_chance() -> None:
    rng = np.random.default_rng(0)
    drawn = [adjusted_rand_index(rng.integers(4, size=40), rng.integers(4, size=40)) for _ in range(500)]
    assert abs(float(np.mean(drawn))) < 0.01


def test_clusterings_of_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        adjusted_rand_index([0, 1], [0, 1, 1])


def test_quality_by_hand() -> None:
    similarity = [[9, 0.5, 0, 0], [0.3, 9, 0, 0], [0, 0, 9, -0.2], [0, 0, -0.2, 9]]
    found = cluster_quality(similarity, [0, 0, 1, 1], loads=[3, 3, 1, 1], load_weight=2.0)
    assert found.similarity == pytest.approx((0.5 + 0.3 - 0.2 - 0.2) / 4)
    assert found.imbalance == pytest.approx((1.5**2 + 0.5**2) / 2 - 1)
    assert found.objective == pytest.approx(found.similarity - 2 * found.imbalance)
    assert cluster_quality(similarity, [1, 1, 0, 0]).imbalance == 0
    assert cluster_quality(similarity, [0, 1, 2, 3]).similarity == 0
    assert cluster_quality(similarity, [0, 0, 1, 1], loads=[0, 0, 0, 0], load_weight=1.0).imbalance == 0
