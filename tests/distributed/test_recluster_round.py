"""A round of re-clustering as a whole: what stops it, and what it says it has gained."""

import itertools
from typing import Any
from unittest import mock

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_migration import Training

pytestmark = pytest.mark.timeout(200)


def _round_with_a_nan() -> tuple[list[tuple[str, int, dict[str, Any]]], bool, bool, bool]:
    training = Training((1, 2, 1), ["recluster.alpha=0.5"])
    statistics, coordinator = training.model.context.statistics, training.coordinator
    assert statistics is not None
    events: list[tuple[str, int, dict[str, Any]]] = []
    placements = list(training.model.context.placements)
    statistics.collecting = True

    def hold(step: int) -> None:
        coordinator._hold_round(step, training.sequences(step), training.sequences(step + 1))

    with mock.patch.object(
        coordinator._recorder, "event", lambda name, step, **more: events.append((name, step, more))
    ):
        statistics.begin_step()
        training.step()
        coordinator._losses.append(training.losses[-1])
        if training.process.rank == 1:
            statistics.activation[0].weighted_ED[3, 0] = float("nan")
        hold(1)
        stayed, round_held = placements == training.model.context.placements, coordinator.totals["rounds"] > 0
        statistics.begin_step()
        training.step()
        hold(2)
    return events, stayed, round_held, coordinator.totals["rounds"] == 1


def test_statistics_that_are_not_finite_on_one_rank_move_no_expert_on_any() -> None:
    for events, stayed, round_held, next_held in run_ranks(_round_with_a_nan, 2):
        ((name, step, fields),) = events
        assert (name, step) == ("recluster_skipped", 1)
        assert fields["reason"].startswith("not finite: ")
        assert stayed
        assert not round_held
        assert next_held, "statistics were reset, so that the next round is held"


def _objectives_of_a_round(limit: float) -> tuple[dict[str, Any], list[list[int]]]:
    words = [
        "recluster.threshold=0",
        "recluster.max_moved=1",
        "recluster.similarity=random",
        f"recluster.max_loss_increase={limit}",
    ]
    training = Training((1, 2, 1), words)
    statistics = training.model.context.statistics
    assert statistics is not None
    statistics.collecting = True
    statistics.begin_step()
    training.step()
    training.coordinator._losses.append(training.losses[-1])
    losses = itertools.chain([1.0], itertools.repeat(1.1))  # before, then with whatever is tried
    with mock.patch.object(training.coordinator.executor, "_loss_of", side_effect=losses):
        training.coordinator._hold_round(1, training.sequences(1), training.sequences(2))
    assert training.coordinator._open is not None
    return training.coordinator._open.fields, [list(p.cluster_of()) for p in training.model.context.placements]


def test_objectives_are_those_of_the_moves_that_were_made() -> None:
    accepted, refused = (run_ranks(_objectives_of_a_round, 2, limit)[0][0] for limit in (0.5, 0.0))
    assert accepted["moved_experts"] > 0
    assert accepted["objective_after"] > accepted["objective_before"]
    assert (refused["moved_experts"], refused["dropped_experts"]) == (0, accepted["moved_experts"])
    assert refused["objective_after"] == refused["objective_before"] == accepted["objective_before"]
