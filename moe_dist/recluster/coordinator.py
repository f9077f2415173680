"""Coordinator: re-clusters the experts of a model under training, as a callback of the training loop.

A round follows the update of a step. All ranks sum their statistics, rank 0 decides, and its plan is broadcast. First
whole clusters change ranks (relocation), then experts change clusters (exchange or refit). The latter changes are
tested on tokens of the next step's batch (`migration_executor.py`).

Shapes: L layers, E experts, G clusters, B sequences, S tokens of a sequence.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.config import RunConfig
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.callback import Callback, StepReport
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine, StepOutcome
from moe_dist.metrics.recorder import Recorder
from moe_dist.recluster.decision import LayerDecision, decide_blocks, decide_layer, objective_of
from moe_dist.recluster.migration_executor import MigrationExecutor, movers_of
from moe_dist.recluster.recluster_plan import ReclusterPlan, broadcast_plan
from moe_dist.recluster.schedule import is_due, last_round
from moe_dist.recluster.similarity_gather import GatheredSimilarity, gather_similarity

AROUND = 5
"""Steps before and after a round whose mean training losses are compared."""


@dataclass
class _Round:
    """Round whose event in `events.jsonl` still lacks the losses of the steps after it."""

    fields: dict[str, Any]
    step: int
    losses_after: list[float] = field(default_factory=list)


class Coordinator(Callback):
    """Callback that re-clusters experts at the steps of the `recluster` schedule."""

    def __init__(self, config: RunConfig, recorder: Recorder) -> None:
        self._config, self._recorder = config, recorder
        self._last_round = last_round(config.train.steps - 1, config.recluster)
        self._losses: deque[float] = deque(maxlen=AROUND)
        self._load_LE = np.zeros((config.moe_layers, config.moe.experts))
        self._open: _Round | None = None
        names = ("rounds", "moved_experts", "rejected_experts", "bytes", "relocation_bytes")
        self.totals: dict[str, float] = {**dict.fromkeys(names, 0), "seconds": 0.0}

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Re-cluster the experts of this engine's model from now on."""
        self.executor = MigrationExecutor(engine, self._config.recluster.max_loss_increase)
        self._process, self._context = engine.process, engine.model.context
        self._layers = engine.model.clustered_layers()

    def release(self) -> None:
        """Drop the references to the model."""
        del self.executor, self._context, self._layers

    def state(self) -> dict[str, Any]:
        """Return the coordinator as a part of checkpoints."""
        return {"coordinator": self}

    def summary(self) -> dict[str, Any]:
        """Return the totals of all rounds."""
        return {"recluster": self.totals}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later rounds depend on, and the totals of earlier ones."""
        return {
            "load_LE": torch.from_numpy(self._load_LE),
            "losses": list(self._losses),
            "totals": self.totals,
            "open": None if self._open is None else vars(self._open),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore the state of `state_dict`."""
        self._load_LE = state["load_LE"].numpy()
        self._losses = deque(state["losses"], maxlen=AROUND)
        self.totals |= state["totals"]
        self._open = None if state["open"] is None else _Round(**state["open"])

    def start(self, step: int) -> None:
        """Record the placement after `step`."""
        if self._layers:
            self._recorder.event("placement", step, **_membership(self._context.placements))

    def before_step(self, step: int) -> None:
        """Decay the statistics, and stop collecting them after the last round."""
        if self._context.statistics is not None:
            self._context.statistics.collecting = step <= self._last_round
            self._context.statistics.begin_step()

    def after_update(self, report: StepReport) -> None:
        """Record a step's loss and loads, and run a round if one is due."""
        if self._context.statistics is None:
            return
        self._record_step(report.outcome)
        step = report.step
        if is_due(step, self._config.recluster) and step <= self._last_round:
            self.close()
            held_BS = report.upcoming()[: self._config.recluster.guard_sequences]
            self._hold_round(step, report.sequences_BS, held_BS)

    def finish(self, step: int) -> None:
        """Write the event of the last round."""
        self.close()

    def close(self) -> None:
        """Write the event of the last round with the losses known so far."""
        if self._open is not None:
            after = self._open.losses_after
            self._recorder.event(
                "recluster", self._open.step, **self._open.fields, loss_after=float(np.mean(after)) if after else None
            )
        self._open = None

    def _hold_round(self, step: int, sequences_BS: Tensor, held_BS: Tensor) -> None:
        started = time.perf_counter()
        gathered = gather_similarity(self._layers, self._config, self._context)
        if gathered.broken:
            parts = ", ".join(gathered.broken)
            self._recorder.event("recluster_skipped", step, reason=f"not finite: {parts}")
            self._recorder.note(
                f"step {step}: no re-clustering, since the experts' statistics are not finite ({parts})"
            )
            return
        decisions = self._decide(gathered) if self._process.rank == 0 else []
        proposal = ReclusterPlan.of(decisions, self._decide_blocks(gathered)) if decisions else None
        plan = broadcast_plan(proposal, self._context.placements, step, self._process.device)
        relocated = self.executor.relocate(plan.blocks)
        moves = [(layer, cycle) for layer, cycles in enumerate(plan.cycles) for cycle in cycles]
        errors: dict[str, Any] = {}
        if self._config.recluster.transition == "adopt":
            made, exchanged, increase = self.executor.exchange(moves, held_BS)
        else:
            made, done, increase = self.executor.refit(moves, sequences_BS, held_BS)
            exchanged, errors = done.bytes, {"output_errors": done.errors}
        fields = {
            "moved_experts": len(movers_of(made)),
            "dropped_experts": len(movers_of(moves)) - len(movers_of(made)),
            "bytes": relocated + exchanged,
            "relocation_bytes": relocated,
            "guard_loss_increase": increase,
            **errors,
            "loss_before": float(np.mean(self._losses)),
            **(self._gains(decisions, gathered) if decisions else {}),
            **_membership(self._context.placements),
            "seconds": time.perf_counter() - started,
        }
        self._open = _Round(fields, step)
        self.totals["rounds"] += 1
        self.totals["rejected_experts"] += fields["dropped_experts"]
        for name in ("moved_experts", "bytes", "relocation_bytes", "seconds"):
            self.totals[name] += fields[name]
        self._recorder.note(
            f"step {step}: {fields['moved_experts']} experts change clusters, {fields['dropped_experts']} rejected; "
            f"{fields['bytes']:,} bytes{f' ({relocated:,} for clusters that change ranks)' if relocated else ''} in "
            f"{fields['seconds']:.2f} s"
        )

    def _decide(self, gathered: GatheredSimilarity) -> list[LayerDecision]:
        settings = (self._config.recluster, self._config.seed)
        return [
            decide_layer(similarity_EE, placement, load_E, *settings)
            for similarity_EE, placement, load_E in zip(
                gathered.similarity_LEE, self._context.placements, self._load_LE, strict=True
            )
        ]

    def _decide_blocks(self, gathered: GatheredSimilarity) -> list[tuple[int, ...]]:
        placements = self._context.placements
        if not self._config.recluster.relocate:
            return [placement.block_of_cluster for placement in placements]
        together = zip(gathered.together_LGG, placements, strict=True)
        return [decide_blocks(together_GG, placement, self._config.seed) for together_GG, placement in together]

    def _gains(self, decisions: Sequence[LayerDecision], gathered: GatheredSimilarity) -> dict[str, Any]:
        """Return objectives before and after the moves made, and the terms of the similarity, means over layers."""
        found = zip(gathered.similarity_LEE, self._context.placements, self._load_LE, strict=True)
        after = [objective_of(alike, now.cluster_of(), load, self._config.recluster) for alike, now, load in found]
        return {
            "objective_before": float(np.mean([decision.objective_before for decision in decisions])),
            "objective_after": float(np.mean(after)),
            "similarity": gathered.parts,
        }

    def _record_step(self, outcome: StepOutcome) -> None:
        self._losses.append(outcome.loss)
        self._load_LE = self._config.recluster.decay * self._load_LE + outcome.count_LE.numpy()
        if self._open is not None:
            self._open.losses_after.append(outcome.loss)
            if len(self._open.losses_after) == AROUND:
                self.close()


def _membership(placements: Sequence[ExpertPlacement]) -> dict[str, Any]:
    return {
        "members": [placement.members for placement in placements],
        "blocks": [placement.block_of_cluster for placement in placements],
        "version": max(placement.version for placement in placements),
    }
