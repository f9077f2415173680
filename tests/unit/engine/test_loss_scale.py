"""Loss scale: halved by overflows, doubled after a window without one, refused at its smallest."""

import pytest

from moe_dist.engine.loss_scale import INITIAL, SMALLEST, WINDOW, LossScale
from moe_dist.errors import TrainingError


def test_the_scale_follows_overflows() -> None:
    scale = LossScale(enabled=True)
    for _ in range(WINDOW - 1):
        scale.update(False)
    assert scale.scale == INITIAL
    scale.update(True)
    assert (scale.scale, scale.skipped, scale.figures()) == (
        INITIAL / 2,
        True,
        {"scale": INITIAL / 2, "skipped_steps": 1},
    )
    for _ in range(WINDOW):
        scale.update(False)
    assert (scale.scale, scale.skipped) == (INITIAL, False)


def test_the_state_is_restored() -> None:
    scale, other = LossScale(enabled=True), LossScale(enabled=True)
    for overflow in (True, False, False):
        scale.update(overflow)
    other.load_state_dict(scale.state_dict())
    for one in (scale, other):
        for _ in range(WINDOW - 2):
            one.update(False)
    assert scale.scale == other.scale == INITIAL
    assert other.skipped_steps == 1


def test_the_smallest_scale_stops_the_run() -> None:
    scale = LossScale(enabled=True)
    while scale.scale > SMALLEST:
        scale.update(True)
    with pytest.raises(TrainingError, match=r"even at a loss scale of 0\.0625"):
        scale.update(True)


def test_other_types_have_a_scale_of_one() -> None:
    scale = LossScale(enabled=False)
    scale.update(False)
    assert scale.scale == 1
    assert scale.figures() is None
