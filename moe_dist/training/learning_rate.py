"""Learning-rate schedule."""

from math import cos, pi

from moe_dist.config import TrainConfig


def learning_rate(step: int, train: TrainConfig, highest: float) -> float:
    """Return the learning rate of update `step`, counted from 1.

    The schedule is a linear warm-up to `highest`, then a cosine, or a constant rate and a linear decay (WSD). The last
    step's rate is `final_lr_ratio * highest`.
    """
    if step <= train.warmup_steps:
        return highest * step / train.warmup_steps
    lowest = highest * train.final_lr_ratio
    if train.schedule == "cosine":
        done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
        return lowest + (highest - lowest) * (1 + cos(pi * done)) / 2
    decay_steps = max(1, min(round(train.decay_fraction * train.steps), train.steps - train.warmup_steps))
    left = (train.steps - step) / decay_steps
    return lowest + (highest - lowest) * min(1.0, left)
