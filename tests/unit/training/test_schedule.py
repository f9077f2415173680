"""Learning-rate schedules: their ends, their bounds, their shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import TrainConfig
from moe_dist.training.learning_rate import learning_rate


@given(st.sampled_from(["cosine", "wsd"]), st.integers(2, 300), st.data())
def test_rises_to_the_highest_and_falls_to_the_last(schedule: str, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    train = TrainConfig.model_validate(
        {"steps": steps, "warmup_steps": warmup, "schedule": schedule, "final_lr_ratio": 0.1}
    )
    rates = [learning_rate(step, train, 2.0) for step in range(1, steps + 1)]
    assert all(0 < rate <= 2.0 + 1e-12 for rate in rates)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(2.0)


def test_wsd_stays_at_the_highest_until_its_decay() -> None:
    train = TrainConfig(steps=100, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_lr_ratio=0.0)
    rates = [learning_rate(step, train, 1.0) for step in range(1, 101)]
    assert set(rates[9:80]) == {1.0}
    assert rates[89] == pytest.approx(0.5)
    assert rates[99] == 0.0
