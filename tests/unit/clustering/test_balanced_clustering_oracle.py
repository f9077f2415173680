"""The slow answer itself: every clustering once, and the best of them."""

import pytest

from tests.oracles.balanced_clustering import balanced_clusterings, best_balanced, number_of_clusterings


@pytest.mark.parametrize(("experts", "clusters", "count"), [(4, 2, 3), (6, 3, 15), (8, 2, 35), (8, 4, 105), (5, 1, 1)])
def test_every_clustering_is_tried_once(experts: int, clusters: int, count: int) -> None:
    tried = list(balanced_clusterings(tuple(range(experts)), experts // clusters))
    assert len({frozenset(map(frozenset, groups)) for groups in tried}) == len(tried) == count
    assert number_of_clusterings(experts, clusters) == count
    assert all(sorted(e for group in groups for e in group) == list(range(experts)) for groups in tried)


def test_the_best_is_found() -> None:
    similarity = [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert best_balanced(similarity, 2) == (((0, 2), (1, 3)), 1.0)
    groups, objective = best_balanced(similarity, 2, loads=[2, 0, 2, 0], load_weight=5)  # {0, 2} would carry all
    assert {0, 2} not in map(set, groups)
    assert objective == 0


def test_what_would_take_for_ever_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        best_balanced([[0] * 32] * 32, 4)
    with pytest.raises(ValueError, match="equal clusters"):
        best_balanced([[0] * 5] * 5, 2)
