"""The transition `refactor`: weights are kept, other clusters untouched, the same on any ranks, and without a trace."""

from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.engine.optimizer_state import STATE_NAMES
from moe_dist.kernels.reference import expert_weights
from moe_dist.moe.clustered_experts import ClusteredExperts
from tests.distributed.ranks import run_ranks
from tests.distributed.test_migration import MOVES, Training

pytestmark = pytest.mark.timeout(400)
UNTOUCHED = [{3}, {1, 2}]
"""Clusters of each layer whose members stay in `MOVES`."""
TWO_LEVELS = ["moe.base=shared+cluster", "moe.base_rank=16"]
VARIANTS = [
    ["world.zero_stage=1"],
    ["world.zero_stage=2", "moe.top_clusters=2"],
    ["moe.expert_vectors=false"],
    ["world.zero_stage=1", *TWO_LEVELS],
]


@dataclass
class Story:
    """What one rank of a run saw."""

    losses: list[float]
    bytes: int = 0
    increase: float = 0.0
    errors: dict[int, dict[int, float]] = field(default_factory=dict)


def _refactored(axes: tuple[int, int, int], variants: list[list[str]]) -> list[Story]:
    stories = []
    for words in variants:
        training = Training(axes, [*words, "recluster.guard_sequences=8"])  # all there are, on any number of ranks
        training.step()
        training.step()
        moved, done, increase = training.coordinator.executor.refit(MOVES, training.sequences(1), training.sequences(2))
        assert moved == MOVES
        for _ in range(3):
            training.step()
        stories.append(Story(training.losses, done.bytes, increase, done.errors))
    return stories


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1, 4, 1), (2, 1, 2)], ids=str)
def test_any_layout_refactors_like_one_rank(axes: tuple[int, int, int]) -> None:
    (alone,) = run_ranks(_refactored, 1, (1, 1, 1), VARIANTS, timeout=180)
    outcomes = run_ranks(_refactored, 4, axes, VARIANTS, timeout=180)
    for number, (words, expected) in enumerate(zip(VARIANTS, alone, strict=True)):
        assert expected.bytes == 0
        assert set(expected.errors) == {0, 1}
        for rank in range(4):
            story = outcomes[rank][number]
            assert story.bytes > 0
            assert story.losses == pytest.approx(expected.losses, rel=1e-4), f"{words}, rank {rank}"
            assert story.increase == pytest.approx(expected.increase, abs=1e-4), f"{words}, rank {rank}"
            for layer, errors in expected.errors.items():
                assert story.errors[layer] == pytest.approx(errors, rel=0.01), f"{words}, rank {rank}"


Weights = dict[tuple[int, int], tuple[Tensor, Tensor]]


def _weights(training: Training) -> tuple[Weights, Weights, dict[tuple[int, int, str], Tensor]]:
    """By layer: effective weights of experts, bases of clusters, vectors of experts."""
    experts: Weights = {}
    bases: Weights = {}
    vectors = {}
    for number, layer in enumerate(training.model.clustered_layers()):
        for cluster, part in enumerate(layer.clusters):
            assert isinstance(part, ClusteredExperts)
            weights = part.weights()
            bases[number, cluster] = (weights.base_in_DH.detach().clone(), weights.base_out_FD.detach().clone())
            for slot, expert in enumerate(layer.placement.members[cluster]):
                w_in, w_out = expert_weights(weights, slot)
                experts[number, expert] = (w_in.detach(), w_out.detach())
                for name, value in part.residuals.named_parameters():
                    if name.startswith(("hidden", "output")):
                        vectors[number, expert, name] = value[slot].detach().clone()
    return experts, bases, vectors


def _around_a_refactoring(words: list[str]) -> tuple[list[float], list[str]]:
    """Largest changes of effective weights, and what should not have changed but has."""
    training = Training((1, 1, 1), words)
    training.step()
    training.step()
    before = _weights(training)
    training.coordinator.executor.refit(MOVES, training.sequences(1), training.sequences(2))
    after = _weights(training)
    changes = [
        float((a - b).abs().max()) for key in before[0] for a, b in zip(before[0][key], after[0][key], strict=True)
    ]
    broken = [f"vector {key}" for key, value in before[2].items() if not torch.equal(value, after[2][key])]
    for (layer, cluster), base in before[1].items():
        same = all(torch.equal(a, b) for a, b in zip(base, after[1][layer, cluster], strict=True))
        if same is not (cluster in UNTOUCHED[layer]):
            broken.append(f"base of cluster {cluster} of layer {layer}")
    return changes, broken


@pytest.mark.parametrize("levels", [[], TWO_LEVELS], ids=["one level", "two levels"])
def test_weights_are_kept_where_the_rank_suffices_and_other_clusters_are_not_touched(levels: list[str]) -> None:
    ((changes, broken),) = run_ranks(_around_a_refactoring, 1, ["moe.rank=16", *levels])
    assert broken == []
    assert max(changes) < 1e-5
    ((changes, broken),) = run_ranks(_around_a_refactoring, 1, ["moe.rank=2", *levels])
    assert broken == []
    assert max(changes) > 1e-3, "what is cut off must show, or the test sees nothing"


def _everything(training: Training) -> dict[str, list[Tensor]]:
    state, found = training.engine.training_state(), {}
    for name, parameter in training.model.named_parameters():
        fragment = state.fragment(parameter)
        kept = [] if fragment is None else [fragment.tensors[kind].clone() for kind in STATE_NAMES]
        found[name] = [parameter.detach().clone(), *kept]
    return found


def _with_a_strict_guard(words: list[str]) -> bool:
    training = Training((1, 2, 1), ["recluster.max_loss_increase=0", *words])
    training.step()
    before, placements = _everything(training), list(training.model.context.placements)
    losses = [1.0, *[2.0] * 50]  # before, then with whatever is tried
    with mock.patch.object(training.coordinator.executor, "_loss_of", side_effect=losses) as tried:
        moved, done, _ = training.coordinator.executor.refit(MOVES, training.sequences(1), training.sequences(2))
    assert moved == []
    assert done.errors == {}
    assert training.model.context.placements == placements
    for name, kept in _everything(training).items():
        assert all(torch.equal(a, b) for a, b in zip(kept, before[name], strict=True)), name
    return tried.call_count > 2


@pytest.mark.parametrize("words", [["world.zero_stage=1"], ["world.zero_stage=0", "train.precision=bfloat16"]])
def test_what_would_harm_leaves_no_trace(words: list[str]) -> None:
    assert all(run_ranks(_with_a_strict_guard, 2, words))
