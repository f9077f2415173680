"""The step at which a run turns from standard experts to clustered ones."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import RunConfig
from moe_dist.conversion.calibration_tokens import mean_loss, sample_tokens
from moe_dist.conversion.standard_to_clustered import ClusteredStart, read_clustered, write_clustered
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.model.language_model import LanguageModel

Build = Callable[[RunConfig], tuple[LanguageModel, DeepSpeedEngine]]


@dataclass
class Trained:
    """A model and its engine; whoever replaces them lets go of the old ones here."""

    model: LanguageModel
    engine: DeepSpeedEngine


def cluster_experts(
    trained: Trained, config: RunConfig, batches_BS: Sequence[Sequence[Tensor]], build: Build
) -> dict[str, Any]:
    """Replaces a standard model by a clustered one that goes on from it; collective.

    The old engine and model are freed before the new ones are made, so that a rank never holds both: between the two it
    has its share of the clustered experts, and of the other parameters' state.

    Args:
        trained: a standard model under training; holds the clustered one afterwards.
        config: of the clustered model.
        batches_BS: this rank's micro-batches of two training batches: compression is fitted to the first, and checked
            on the second.
        build: makes model and engine.

    Returns:
        The figures of the event `clustered`.
    """
    started = time.perf_counter()
    (fit, _), (check, before) = (sample_tokens(trained.model, batch_BS) for batch_BS in batches_BS)
    start = read_clustered(trained.model, trained.engine.training_state(), config, fit, check)
    trained.engine.close()
    del trained.engine, trained.model, fit, check
    gc.collect()  # DeepSpeed's hooks and ours refer to each other in circles
    trained.model, trained.engine = build(config)
    write_clustered(start, trained.model, trained.engine.training_state())
    after = mean_loss(trained.model, batches_BS[1])
    return {
        "seconds": time.perf_counter() - started,
        "bytes": sum(layer.bytes for layer in start.layers) * trained.model.context.mesh.shape.data,
        "loss_before": before,
        "loss_after": after,
        **_errors(start),
    }


def _errors(start: ClusteredStart) -> dict[str, Any]:
    """How well experts are kept: relative errors of their outputs on held-back tokens."""
    error_LE = torch.stack([layer.output_error_E for layer in start.layers])
    base_LE = torch.stack([layer.base_output_error_E for layer in start.layers])
    return {
        "output_error": float(error_LE.mean()),
        "output_error_largest": float(error_LE.max()),
        "output_error_of_bases": float(base_LE.mean()),
        "output_errors": [[round(error, 4) for error in row] for row in error_LE.tolist()],
        "whitened": sum(layer.whitened for layer in start.layers) / len(start.layers),
        "similarity": start.similarity,
    }
