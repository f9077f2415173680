"""Standard warm-up: conversion of standard experts to clustered ones after the first steps of a run."""

import gc
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_dist.conversion.calibration_tokens import mean_loss, sample_tokens
from moe_dist.conversion.standard_to_clustered import ClusteredStart, read_clustered, write_clustered
from moe_dist.engine.callback import Callback, StepReport

if TYPE_CHECKING:
    from moe_dist.training.trainer import Trainer

CONVERSION = ("seconds", "bytes", "loss_before", "loss_after", "output_error", "output_error_largest")
"""Figures of the event `clustered` that the summary shows."""


class StandardWarmup(Callback):
    """Callback that replaces the standard model by a clustered one at the end of the standard warm-up."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._conversion: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return the conversion as a part of checkpoints."""
        return {"warmup": self}

    def state_dict(self) -> dict[str, Any]:
        """Return the figures of the conversion; empty before it."""
        return self._conversion

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore the figures of a conversion."""
        self._conversion = dict(state)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the conversion, if there was one."""
        return {"conversion": self._conversion or None}

    def after_step(self, report: StepReport) -> None:
        """Convert the experts after the warm-up's last step, calibrated on tokens of the next two batches."""
        trainer = self._trainer
        if report.step != trainer.config.standard_steps:
            return
        trainer.logger.record_loads(report.step)
        micro, device = trainer.batch.micro, trainer.process.device
        batches_BS = [
            trainer.loader.batch(report.step + ahead).sequences_BS.to(device).split(micro) for ahead in (0, 1)
        ]
        figures = cluster_experts(trainer, batches_BS, report.step)
        trainer.logger.history.step_seconds[-1] += figures["seconds"]
        trainer.recorder.event("clustered", report.step, **figures)
        self._conversion = {"step": report.step, **{name: figures[name] for name in CONVERSION}}
        trainer.recorder.note(
            f"step {report.step}: standard experts become {trainer.config.moe.clusters} clusters; outputs change by "
            f"{figures['output_error']:.2f} (largest {figures['output_error_largest']:.2f}), the loss from "
            f"{figures['loss_before']:.4f} to {figures['loss_after']:.4f}"
        )


def cluster_experts(trainer: "Trainer", batches_BS: Sequence[Sequence[Tensor]], step: int) -> dict[str, Any]:
    """Replace the standard model by a clustered one that approximates it; collective.

    The old engine and model are freed before the new ones are created, so that a rank never holds both. In between it
    holds its share of the clustered experts, and the state of its other parameters.

    Args:
        batches_BS: this rank's micro-batches of two training batches: the compression is fitted to the first, and its
            error is measured on the second.

    Returns:
        The figures of the event `clustered`.
    """
    started = time.perf_counter()
    (fit, _), (check, before) = (sample_tokens(trainer.model, batch_BS) for batch_BS in batches_BS)
    beginning = read_clustered(trainer.model, trainer.engine.training_state(), trainer.config, fit, check)
    trainer.release_model()
    del fit, check
    gc.collect()  # DeepSpeed's hooks and ours form reference cycles
    trainer.replace_model(
        trainer.config,
        lambda: write_clustered(beginning, trainer.model, trainer.engine.training_state()),
        step,
    )
    after = mean_loss(trainer.model, batches_BS[1])
    return {
        "seconds": time.perf_counter() - started,
        "bytes": sum(layer.bytes for layer in beginning.layers) * trainer.model.context.mesh.shape.data,
        "loss_before": before,
        "loss_after": after,
        **_figures(beginning),
    }


def _figures(start: ClusteredStart) -> dict[str, Any]:
    """Return the relative errors of the experts' outputs on held-out tokens, and the similarity within clusters."""
    error_LE, base_LE, whitened_LE = torch.stack([layer.figures_E3 for layer in start.layers]).unbind(2)
    similarities = [layer.similarity for layer in start.layers]
    return {
        "output_error": float(error_LE.mean()),
        "output_error_largest": float(error_LE.max()),
        "output_error_of_bases": float(base_LE.mean()),
        "output_errors": [[round(error, 4) for error in row] for row in error_LE.tolist()],
        "whitened": float(whitened_LE.mean()),
        "similarity": {name: mean(one[name] for one in similarities) for name in similarities[0]},
    }
