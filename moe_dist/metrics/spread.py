"""Median and spread of repeated measurements."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes over the rounds."""

    median: float
    lower: float
    upper: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute the statistics; quartiles are inclusive, so that with few rounds they stay within the data."""
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(statistics.median(values), lower, upper, min(values), max(values))

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> "Spread":
        """Compute the statistics of the ratios within rounds."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def text(self, factor: float = 1.0, digits: int = 2) -> str:
        """Format as `median [lower-upper]`, for a rich table."""
        median, lower, upper = (f"{factor * value:.{digits}f}" for value in (self.median, self.lower, self.upper))
        return f"{median} \\[{lower}-{upper}]"
