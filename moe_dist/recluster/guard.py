"""Guard: makes only those moves of experts whose effect on the loss, tried on real tokens, is within a limit."""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

Change = TypeVar("Change", bound=Hashable)
Made = TypeVar("Made", bound=Hashable, contravariant=True)


class Transition(Protocol[Made]):
    """Way in which experts change clusters; every trial can be reverted."""

    def apply(self, moves: Sequence[Made]) -> None:
        """Make these moves on trial; collective."""

    def revert(self) -> None:
        """Undo the moves on trial, to the last bit."""

    def commit(self, moves: Sequence[Made]) -> None:
        """Make these moves for good; collective."""


def make_guarded(
    moves: Sequence[Change], transition: Transition[Change], loss: Callable[[], float], limit: float
) -> tuple[list[Change], float]:
    """Make the moves that do not raise the loss too much; collective.

    Args:
        loss: returns the loss on tokens that the model was not trained on.
        limit: largest relative increase of the loss.

    Returns:
        The moves made, and the relative increase of the loss that was seen for them.
    """
    base = loss() if moves else 0.0
    seen: dict[tuple[Change, ...], float] = {(): 0.0}

    def increase(some: Sequence[Change]) -> float:
        transition.apply(some)
        seen[tuple(some)] = loss() / base - 1
        transition.revert()
        return seen[tuple(some)]

    made = accept(list(moves), increase, limit)
    transition.commit(made)
    return made, seen[tuple(made)]


def accept(changes: Sequence[Change], harm: Callable[[Sequence[Change]], float], limit: float) -> list[Change]:
    """Return the changes that together cost at most `limit`, found by halving: all if they do, else the halves that do.

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
