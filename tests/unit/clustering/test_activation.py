"""Moving averages of what experts are given, against plain loops."""

import pytest
import torch
from torch import Tensor

from moe_dist.clustering import ActivationStatistics

Batch = tuple[Tensor, Tensor, Tensor]
EXPERTS, HIDDEN, DECAY = 5, 4, 0.8


def draw_batch(seed: int, rows: int = 12) -> Batch:
    g = torch.Generator().manual_seed(seed)
    expert_RK = torch.rand(rows, EXPERTS, generator=g).argsort(1)[:, :2]
    return torch.randn(rows, HIDDEN, generator=g), expert_RK, torch.rand(rows, 2, generator=g)


def observe(steps: list[list[Batch]]) -> ActivationStatistics:
    statistics = ActivationStatistics.empty(EXPERTS, HIDDEN, DECAY)
    for batches in steps:
        statistics.begin_step()
        for batch in batches:
            statistics.update(*batch)
    return statistics


def test_centroids_are_the_corrected_averages_written_out() -> None:
    batches = [draw_batch(seed) for seed in range(4)]
    found = observe([[batch] for batch in batches])
    average_ED, average_E = torch.zeros(EXPERTS, HIDDEN), torch.zeros(EXPERTS)
    for x_RD, expert_RK, weight_RK in batches:
        step_ED, step_E = torch.zeros(EXPERTS, HIDDEN), torch.zeros(EXPERTS)
        for x_D, experts, weights in zip(x_RD, expert_RK.tolist(), weight_RK.tolist(), strict=True):
            for expert, weight in zip(experts, weights, strict=True):
                step_ED[expert] += weight * x_D
                step_E[expert] += weight
        average_ED = DECAY * average_ED + (1 - DECAY) * step_ED
        average_E = DECAY * average_E + (1 - DECAY) * step_E
    correction = 1 - DECAY ** len(batches)
    assert torch.allclose(found.mean_mass(), average_E / correction, rtol=1e-5)
    assert torch.allclose(found.centroids(), (average_ED / correction) / (average_E / correction)[:, None], atol=1e-6)


def test_the_start_from_zero_leaves_no_trace() -> None:
    """What never changes is its own average from the first step on."""
    batch = draw_batch(0)
    first, tenth = observe([[batch]]), observe([[batch]] * 10)
    assert torch.allclose(first.mean_mass(), tenth.mean_mass(), rtol=1e-5)
    assert torch.allclose(first.centroids(), tenth.centroids(), atol=1e-6)


def test_ranks_and_micro_batches_add_up() -> None:
    steps = [[draw_batch(10 * step + part) for part in range(3)] for step in range(3)]
    whole = observe(steps)
    ranks = [observe([[step[0], step[2]] for step in steps]), observe([[step[1]] for step in steps])]
    together = ActivationStatistics.merged(ranks)
    assert torch.allclose(together.centroids(), whole.centroids(), atol=1e-6)
    assert torch.allclose(together.mean_mass(), whole.mean_mass(), rtol=1e-5)


def test_absent_choices_and_idle_experts_count_nothing() -> None:
    statistics = ActivationStatistics.empty(3, 2, DECAY)
    assert torch.equal(statistics.mean_mass(), torch.zeros(3))
    statistics.begin_step()
    statistics.update(
        torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.tensor([[2, -1]]), torch.tensor([[0.5, 0.5]])
    )
    assert statistics.seen.tolist() == [False, False, True]
    assert torch.equal(statistics.centroids(), torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]]))


def test_what_was_given_long_ago_is_forgotten_before_it_is_noise() -> None:
    statistics = ActivationStatistics.empty(1, 2, DECAY)
    statistics.begin_step()
    statistics.update(torch.tensor([[3.0, -4.0]]), torch.tensor([[0]]), torch.tensor([[1.0]]))
    while statistics.seen.item():
        assert torch.allclose(statistics.centroids(), torch.tensor([[3.0, -4.0]]), rtol=1e-3)
        statistics.begin_step()
    assert torch.equal(statistics.centroids(), torch.zeros(1, 2))


def test_nan_shows_and_stays_until_a_reset() -> None:
    x_RD, expert_RK, weight_RK = draw_batch(0)
    x_RD[3, 1] = float("nan")
    statistics = observe([[(x_RD, expert_RK, weight_RK)], [draw_batch(1)]])
    assert statistics.centroids().isnan().any()
    statistics.reset()
    statistics.begin_step()
    statistics.update(*draw_batch(1))
    assert torch.equal(statistics.centroids(), observe([[draw_batch(1)]]).centroids())


def test_bad_decay_and_unlike_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        ActivationStatistics.empty(2, 2, 1.0)
    with pytest.raises(ValueError, match="different steps"):
        ActivationStatistics.merged([observe([[draw_batch(0)]]), observe([[draw_batch(0)]] * 2)])
