"""What stops a run: faults that all ranks know of, each in one line that names the step."""

import math

import pytest
import torch

from moe_dist.engine.deepspeed_engine import StepOutcome
from moe_dist.errors import TrainingError
from moe_dist.training.trainer import _stop_if_broken, _stop_if_norm_broken


def test_a_norm_that_is_not_finite_stops_the_run() -> None:
    _stop_if_norm_broken(3, 0.5)
    for norm in (math.nan, math.inf):
        with pytest.raises(TrainingError, match=r"^step 3: the global gradient norm is (nan|inf)"):
            _stop_if_norm_broken(3, norm)


def test_broken_ranks_are_named() -> None:
    _stop_if_broken(7, StepOutcome(1.0, (), torch.zeros(1, 1), 0.0, 0.0, 0.0, False))
    with pytest.raises(TrainingError, match=r"^step 7: the loss of rank 1, 3 is NaN or infinite"):
        _stop_if_broken(7, StepOutcome(1.0, (1, 3), torch.zeros(1, 1), 0.0, 0.0, 0.0, False))
