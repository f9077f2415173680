"""Median, quartiles and extremes on values small enough to see."""

from moe_dist.metrics.spread import Spread


def test_the_median_and_quartiles_within_the_data() -> None:
    assert Spread.of([10.0, 1.0, 2.0, 3.0, 100.0]) == Spread(3.0, 2.0, 10.0, 1.0, 100.0)
    assert Spread.of([1.0, 3.0]) == Spread(2.0, 1.5, 2.5, 1.0, 3.0)
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 4.0, 4.0)


def test_ratios_are_taken_within_rounds() -> None:
    assert Spread.of_ratios([6.0, 8.0, 30.0], [2.0, 4.0, 3.0]).median == 3.0
    assert Spread.of([1.0, 2.0, 3.0]).text(factor=10, digits=0) == r"20 \[15-25]"
