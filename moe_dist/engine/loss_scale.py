"""Dynamic loss scale of float16 training.

DeepSpeed divides gradients by the scale; the scale itself is changed here, alike for every ZeRO stage. (DeepSpeed's own
scalers differ between stages, and divide the gradients of the step after which the scale grows by the new scale.)
"""

from collections.abc import Mapping
from typing import Any

from moe_dist.errors import TrainingError

INITIAL = 2.0**16
SMALLEST = 2.0**-4
WINDOW = 1000
"""Steps without overflow after which the scale is doubled."""


class LossScale:
    """Loss scale, a power of two: halved after a step whose gradients overflow, which is skipped on all ranks.

    Attributes:
        enabled: False with other types than float16, for which the scale is always 1.
        skipped: True if the last step was skipped.
        skipped_steps: number of skipped steps.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.scale = enabled, INITIAL if enabled else 1.0
        self.skipped, self.skipped_steps, self._good_steps = False, 0, 0

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step.

        Raises:
            TrainingError: gradients overflow at the smallest scale.
        """
        self.skipped = overflow
        if not self.enabled:
            return
        self._good_steps = 0 if overflow else self._good_steps + 1
        if overflow:
            self.skipped_steps += 1
            if self.scale <= SMALLEST:
                raise TrainingError(
                    f"gradients overflow float16 even at a loss scale of {self.scale:g}; all ranks stop. Lower "
                    "optimizer.learning_rate, or set train.precision to bfloat16"
                )
            self.scale /= 2
        elif self._good_steps == WINDOW:
            self.scale, self._good_steps = self.scale * 2, 0

    def figures(self) -> dict[str, float] | None:
        """Return scale and skipped steps for metrics; None if it is not enabled."""
        return {"scale": self.scale, "skipped_steps": self.skipped_steps} if self.enabled else None

    def state_dict(self) -> dict[str, Any]:
        """Return scale and counters."""
        return {"scale": self.scale, "skipped_steps": self.skipped_steps, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore scale and counters."""
        self.scale, self.skipped_steps = state["scale"], state["skipped_steps"]
        self._good_steps = state["good_steps"]
