"""Hooks of the training loop: whatever accompanies training is a callback."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moe_dist.engine.deepspeed_engine import DeepSpeedEngine, StepOutcome


@dataclass
class StepReport:
    """One step of training after its update, the same on all ranks except for the sequences.

    Attributes:
        sequences_BS: this rank's share of the step's batch.
        upcoming: returns its share of the next batch, on which the model has not been trained.
        waited: seconds that this rank waited for its batch; part of `seconds`.
        seconds: duration of the step; 0 until `after_step`.
    """

    step: int
    outcome: StepOutcome
    learning_rate: float
    gradient_norm: float
    sequences_BS: Tensor
    upcoming: Callable[[], Tensor]
    waited: float = 0.0
    seconds: float = 0.0


class Callback:
    """Hooks that do nothing; all ranks call them at the same points, so that they may be collective."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clean up after the loop has ended or failed."""

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Use this engine and its model from now on."""

    def release(self) -> None:
        """Drop all references to engine and model, which are about to be replaced."""

    def start(self, step: int) -> None:
        """Prepare for the steps after `step`; called after a checkpoint was restored."""

    def before_step(self, step: int) -> None:
        """Prepare for a step; counts towards its time."""

    def after_update(self, report: StepReport) -> None:
        """React to an update of the weights; counts towards the step's time."""

    def after_step(self, report: StepReport) -> None:
        """Record a step."""

    def before_evaluation(self, step: int) -> None:
        """Prepare for an evaluation."""

    def after_evaluation(self, step: int, loss: float, by_source: Mapping[str, float]) -> None:
        """Record a validation loss, nats a token, and that of each source of a blend."""

    def end_step(self, step: int) -> None:
        """Act after a step and its evaluation, such as by saving a checkpoint."""

    def stop(self, step: int) -> None:
        """Save what is needed to resume, since the run was asked to stop after `step`."""

    def finish(self, step: int) -> None:
        """Complete the run after its last step."""

    def state(self) -> Mapping[str, Any]:
        """Return objects with `state_dict` and `load_state_dict` that belong in checkpoints, by name."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return entries of the run's summary."""
        return {}
