"""Summary of a run at its end."""

from typing import TYPE_CHECKING, Any

import torch

from moe_dist.config import RunConfig, WorldShape
from moe_dist.config.byte_sizes import FLOAT32, MOMENTS
from moe_dist.config.layer_kinds import LAYER_KINDS
from moe_dist.dispatch.layout_advice import flat_bytes
from moe_dist.metrics import installed_versions
from moe_dist.model.parameter_counts import count_parameters
from moe_dist.moe.quantized_experts import stored_sizes
from moe_dist.training.banner import device_words
from moe_dist.training.offload_metrics import offload_figures
from moe_dist.training.source_metrics import data_summary
from moe_dist.training.summary_metrics import all_to_all_totals, collective_totals, model_bytes, peak_memory

if TYPE_CHECKING:
    from moe_dist.training.trainer import Trainer


def run_summary(trainer: "Trainer") -> dict[str, Any]:
    """Return the figures of `summary.json` (docs/metrics.md); collective."""
    config, process = trainer.config, trainer.process
    counts, peaks = count_parameters(trainer.model), peak_memory(process)
    whole, offloadable = model_bytes(trainer.engine)
    offload = offload_figures(trainer.engine, process)
    on_device = whole - offloadable + (offload["peak_device_bytes"] if offload else 0)
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:
        found |= callback.summary()
    found["validation"] = {**found["validation"], "loss_stored": _loss_as_stored(trainer)}
    return {
        "name": config.name,
        "kind": config.moe.kind,
        **found,
        "data": data_summary(trainer),
        "loss_scale": trainer.loss_scale.figures(),
        "parameters": vars(counts),
        "all_to_all": {
            **all_to_all_totals(trainer.ledger, found["tokens"], config.moe_layers, process),
            "flat_bytes_per_token_layer": _flat_bytes(trainer),
            "wire_dtype": config.moe.wire_dtype if config.moe.layer_kind.routed else None,
        },
        "capacity": {"factor": config.moe.capacity_factor},
        "collectives": collective_totals(trainer.engine, trainer.ledger.links),
        "stored": _stored_bytes(trainer),
        "memory": {
            "peak_rss_bytes": max(peaks.rss_by_rank),
            "peak_rss_bytes_by_rank": peaks.rss_by_rank,
            "peak_device_bytes": peaks.device,
            "model_bytes": whole,
            "offloadable_bytes": offloadable,
            "device_bytes": on_device,
            "dense_bytes": _dense_bytes(config, counts.total - counts.expert, trainer.shape),
            "offload": offload,
        },
        "world": vars(trainer.shape),
        "device": device_words(process.device),
        "seed": config.seed,
        "versions": installed_versions(),
    }


def _flat_bytes(trainer: "Trainer") -> float | None:
    """Return the expected all-to-all bytes per token and layer of flat routing over the same ranks."""
    config = trainer.config
    if not config.moe.layer_kind.routed:
        return None
    return flat_bytes(config.model, config.moe, trainer.shape)


def _stored_bytes(trainer: "Trainer") -> dict[str, int] | None:
    """Return the bytes of all clusters as stored, of their residuals in it, and in float32; None: not quantized."""
    config, moe = trainer.config, trainer.config.moe
    if config.precision.residuals == "none":
        return None
    cluster = stored_sizes(config, moe.experts_per_cluster)
    clusters = config.moe_layers * moe.clusters
    layer = moe.layer_kind.parameters(config.model.hidden_size, moe, 1, 1)
    return {
        "expert_bytes": clusters * cluster.nbytes,
        "residual_bytes": clusters * cluster.experts.nbytes,
        "float32_bytes": FLOAT32 * config.moe_layers * (layer.base + layer.expert),
    }


def _dense_bytes(config: RunConfig, other_parameters: int, shape: WorldShape) -> int:
    """Return weights, gradients and training state of a rank of a dense model of the same active width.

    With pipeline stages the mean over them.
    """
    layer = LAYER_KINDS["dense"].parameters(config.model.hidden_size, config.moe, 1, 1).dense
    size = getattr(torch, config.train.precision).itemsize
    optimizer = MOMENTS + (FLOAT32 if size < FLOAT32 else 0)
    shares = shape.stage_ranks if config.world.zero_stage else 1
    held = (other_parameters + config.model.layers * layer) / shape.pipeline
    return int(held * (2 * size + optimizer / shares))


def _loss_as_stored(trainer: "Trainer") -> float | None:
    """Return the validation loss with experts quantized as they are stored; None: they are stored unquantized."""
    if trainer.config.precision.residuals == "none":
        return None
    with trainer.model.with_quantized_experts():
        return trainer.validation_loss().mean
