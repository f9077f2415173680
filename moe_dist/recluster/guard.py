"""Keeps only those exchanges of experts whose effect on the loss, tried on real tokens, is within a limit."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Change = TypeVar("Change")


def accept(changes: Sequence[Change], harm: Callable[[Sequence[Change]], float], limit: float) -> list[Change]:
    """The changes that together cost at most `limit`, found by halving: all if they do, else the halves that do.

    Args:
        changes: independent of each other: any selection can be made.
        harm: increase of the loss if exactly these are made; NaN counts as too much.
        limit: largest increase.
    """
    accepted: list[Change] = []

    def consider(some: Sequence[Change]) -> None:
        if harm([*accepted, *some]) <= limit:
            accepted.extend(some)
        elif len(some) > 1:
            consider(some[: len(some) // 2])
            consider(some[len(some) // 2 :])

    if changes:
        consider(changes)
    return accepted
