"""Coordinator: when statistics are collected, what the decision gets, and on which tokens moves are tried."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dist.config import RunConfig, WorldShape, load_config
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.callback import StepReport
from moe_dist.engine.deepspeed_engine import StepOutcome
from moe_dist.metrics.recorder import Recorder
from moe_dist.moe.routing_statistics import RoutingStatistics
from moe_dist.recluster import coordinator as module
from moe_dist.recluster.coordinator import Coordinator
from moe_dist.recluster.recluster_plan import ReclusterPlan
from moe_dist.recluster.similarity_gather import GatheredSimilarity

WORDS = [
    "model.layers=1", "model.hidden_size=8", "model.heads=2", "moe.experts=8", "moe.clusters=4", "moe.top_clusters=2",
    "train.steps=8", "train.warmup_steps=1", "recluster.period=2", "recluster.start=2", "recluster.growth=1",
    "recluster.threshold=0", "recluster.max_moved=1", "recluster.decay=0.5",
]  # fmt: skip
TRAINED, NEXT = torch.full((2, 3), 7), torch.tensor([[1, 2, 3], [4, 5, 6]])


class Executor:
    """Executor that makes all moves, and notes what it was asked for."""

    def __init__(self, placements: list[ExpertPlacement]) -> None:
        self.placements = placements
        self.tried_on: list[Tensor] = []
        self.fitted_on: list[Tensor] = []
        self.blocks: list[Any] = []
        self.moves: list[Any] = []

    def relocate(self, blocks: Any) -> int:
        self.blocks.append(blocks)
        return 100

    def exchange(self, moves: Any, held_BS: Tensor) -> tuple[Any, int, float]:
        self.tried_on.append(held_BS)
        self.moves.append(list(moves))
        return moves, 11, 0.25

    def refit(self, moves: Any, sequences_BS: Tensor, held_BS: Tensor) -> tuple[Any, Any, float]:
        self.fitted_on.append(sequences_BS)
        self.tried_on.append(held_BS)
        return moves, SimpleNamespace(bytes=13, errors={}), 0.5


class Events(Recorder):
    """Recorder that keeps events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, Any]]] = []

    def event(self, name: str, step: int, **fields: Any) -> None:
        self.events.append((name, step, fields))


class Stage:
    """Coordinator of one layer of eight experts in four clusters on two ranks, without an engine."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *words: str, similarity: Any = None, together: Any = None
    ) -> None:
        self.config: RunConfig = load_config(None, [*WORDS, *words])
        self.placements = [ExpertPlacement.contiguous(8, 4, WorldShape(1, 2, 1))]
        self.statistics = RoutingStatistics.create(1, 8, self.config.moe, self.config.recluster.decay)
        context = SimpleNamespace(placements=self.placements, statistics=self.statistics)
        self.recorder, self.executor = Events(), Executor(self.placements)
        self.coordinator = Coordinator(self.config, self.recorder)
        coordinator: Any = self.coordinator
        coordinator.executor = self.executor
        coordinator._process = SimpleNamespace(rank=0, device=torch.device("cpu"))
        coordinator._context, coordinator._layers = context, [object()]
        gathered = GatheredSimilarity(
            [np.zeros((8, 8)) if similarity is None else similarity],
            [np.zeros((4, 4)) if together is None else together],
            (),
            {},
        )
        monkeypatch.setattr(module, "gather_similarity", lambda *_: gathered)
        self.plans: list[ReclusterPlan] = []

        def broadcast(plan: ReclusterPlan, *_: Any) -> ReclusterPlan:
            self.plans.append(plan)
            return plan

        monkeypatch.setattr(module, "broadcast_plan", broadcast)

    def step(self, step: int, loads: list[float] | None = None, loss: float = 2.0) -> None:
        count_LE = torch.tensor([loads or [1.0] * 8], dtype=torch.float64)
        outcome = StepOutcome(loss, (), count_LE, 0.0, 0.0, 0.0, False)
        self.coordinator.before_step(step)
        self.coordinator.after_update(StepReport(step, outcome, 0.1, 1.0, TRAINED, lambda: NEXT))


def test_statistics_are_collected_in_every_step_up_to_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)  # rounds follow steps 2, 4 and 6; one after the last step, 8, would move for nothing
    collecting = []
    for step in range(1, 9):
        stage.coordinator.before_step(step)
        collecting.append(stage.statistics.collecting)
    assert collecting == [True] * 6 + [False] * 2, "statistics are collected in steps 1 to 6, the last round's step"


def test_every_step_begins_with_faded_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    stage.coordinator.before_step(1)
    stage.statistics.record_rows(0, torch.ones(1, 8), torch.tensor([[0]]), torch.ones(1, 1), torch.tensor([3]))
    stage.statistics.record_clusters(0, torch.tensor([[1, 2]]), 4)
    stage.coordinator.before_step(2)
    stage.coordinator.before_step(3)
    assert stage.statistics.activation[0].mass_E[3] == 0.25, "a token's weight halves in each of two steps"
    assert stage.statistics.activation[0].weighted_ED[3].tolist() == [0.25] * 8
    assert stage.statistics.together_LGG[0, 1, 2] == 0.25, "a pair's count halves in each of two steps"
    assert stage.statistics.activation[0].steps == 1.75, "1 + 1/2 + 1/4"


def test_loads_are_a_fading_sum_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    for step, load in ((1, 16.0), (3, 4.0), (5, 1.0)):
        stage.step(step, [load, *[0.0] * 7])
    load_LE = stage.coordinator.state_dict()["load_LE"]
    assert load_LE[0, 0] == 16 / 4 + 4 / 2 + 1, "each earlier step counts half as much as the next one"


def test_heavy_experts_part_by_the_loads_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts 0 and 1 share a cluster and all tokens: with a price on imbalance one of them has to leave."""
    stage = Stage(monkeypatch, "recluster.load_weight=1", "recluster.relocate=false")
    stage.step(1, [8.0, 8.0, *[0.0] * 6])
    stage.step(2, [8.0, 8.0, *[0.0] * 6])
    ((cycles,),) = (plan.cycles for plan in stage.plans)
    movers = {expert for cycle in cycles for expert in cycle}
    assert len(movers & {0, 1}) == 1, f"loads decide: one of the heavy experts 0 and 1 moves, not {movers}"
    ((_, _, fields),) = _closed(stage)
    assert fields["objective_before"] == -3, "one cluster of four has all: mean((L / mean L)^2) - 1 = 16 / 4 - 1"


def _closed(stage: Stage) -> list[tuple[str, int, dict[str, Any]]]:
    stage.coordinator.close()
    return stage.recorder.events


@pytest.mark.parametrize("transition", ["adopt", "refit"])
def test_moves_are_tried_on_tokens_of_the_next_batch(monkeypatch: pytest.MonkeyPatch, transition: str) -> None:
    stage = Stage(monkeypatch, f"recluster.transition={transition}", "moe.rank=2", "recluster.guard_sequences=1")
    stage.step(2)
    (tried,) = stage.executor.tried_on
    assert tried.tolist() == [[1, 2, 3]], "the guard tries moves on the first sequence of the next batch"
    if transition == "refit":
        (fitted,) = stage.executor.fitted_on
        assert fitted is TRAINED, "bases are fitted on the step's own batch"


def test_rounds_follow_the_schedule_and_close_after_five_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "recluster.period=6")
    for step in range(1, 8):
        stage.step(step, loss=float(step))
    ((name, step, fields),) = stage.recorder.events
    assert (name, step) == ("recluster", 2)
    assert fields["loss_before"] == 1.5, "mean loss of steps 1 and 2"
    assert fields["loss_after"] == 5, "mean loss of steps 3 to 7"
    assert (fields["bytes"], fields["relocation_bytes"], fields["guard_loss_increase"]) == (111, 100, 0.25)
    assert stage.coordinator.summary()["recluster"]["rounds"] == 1
    assert stage.coordinator.summary()["recluster"]["bytes"] == 111


def test_clusters_that_tokens_choose_together_are_relocated_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    together_GG = np.zeros((4, 4))
    together_GG[0, 2] = together_GG[2, 0] = 5.0
    stage = Stage(monkeypatch, together=together_GG)
    stage.step(2)
    blocks = stage.plans[0].blocks[0]
    assert blocks[0] == blocks[2] != blocks[1] == blocks[3], f"clusters 0 and 2 share a rank, not {blocks}"
    still = Stage(monkeypatch, "recluster.relocate=false", together=together_GG)
    still.step(2)
    assert still.plans[0].blocks == ((0, 0, 1, 1),)


def test_a_resumed_coordinator_has_the_loads_losses_and_totals_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Stage(monkeypatch), Stage(monkeypatch)
    first.step(1, [3.0] * 8, loss=4.0)
    first.step(2, [5.0] * 8, loss=6.0)
    second.coordinator.load_state_dict(first.coordinator.state_dict())
    state = second.coordinator.state_dict()
    assert state["load_LE"].tolist() == [[3 / 2 + 5] * 8]
    assert (state["losses"], state["totals"]["rounds"], state["open"]["step"]) == ([4.0, 6.0], 1, 2)
