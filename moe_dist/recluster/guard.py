"""Guard: applies only those moves of experts whose effect on the loss, measured on real tokens, is within a limit."""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

Change = TypeVar("Change", bound=Hashable)
Made = TypeVar("Made", bound=Hashable, contravariant=True)


class Transition(Protocol[Made]):
    """Interface of `adopt` and `refit`: apply moves on trial, revert them, or commit them."""

    def apply(self, moves: Sequence[Made]) -> None:
        """Apply moves on trial; collective."""

    def revert(self) -> None:
        """Undo the trial moves, bit-identically."""

    def commit(self, moves: Sequence[Made]) -> None:
        """Apply moves permanently; collective."""


def make_guarded(
    moves: Sequence[Change], transition: Transition[Change], loss: Callable[[], float], limit: float
) -> tuple[list[Change], float]:
    """Commit the moves that do not raise the loss too much; collective.

    Args:
        loss: returns the loss on tokens that the model was not trained on.
        limit: largest relative increase of the loss.

    Returns:
        The moves made, and the relative increase of the loss measured for them.
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
    """Select changes that together cost at most `limit`, by bisection: all of them, or recursively each half.

    Args:
        changes: independent changes, of which any selection can be made.
        harm: returns the increase of the loss if exactly these changes are made; NaN exceeds the limit.
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
