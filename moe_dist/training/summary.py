"""Description of a run at its start, and its summary at the end."""

from typing import TYPE_CHECKING, Any

import torch

from moe_dist.config import RunConfig, WorldShape
from moe_dist.config.layer_kinds import LAYER_KINDS
from moe_dist.dispatch.layout_advice import flat_bytes
from moe_dist.metrics import installed_versions
from moe_dist.model.language_model import count_parameters
from moe_dist.moe.quantized_experts import stored_sizes
from moe_dist.training.offload_metrics import offload_figures
from moe_dist.training.source_metrics import data_summary
from moe_dist.training.summary_metrics import all_to_all_totals, collective_totals, model_bytes, peak_memory

if TYPE_CHECKING:
    from moe_dist.training.trainer import Trainer

FLOAT32, MOMENTS = 4, 8
"""Bytes of a float32 master weight, and of AdamW's two moments."""


def description(trainer: "Trainer") -> str:
    """Return one line about model, ranks, precision and data."""
    config, moe = trainer.config, trainer.config.moe
    warmup = f", after {config.standard_steps} steps of standard experts" if config.standard_steps else ""
    return (
        f"{config.name}: {config.model.layers} layers of {config.model.hidden_size}, "
        f"{moe.layer_kind.describe(moe)}{warmup}; "
        f"{trainer.process.ranks} rank(s): {trainer.shape}; ZeRO {config.world.zero_stage}, {config.train.precision}, "
        f"{trainer.data.tokens:,} tokens of {config.corpus.kind} text, {trainer.data.vocab_size} pieces"
    )


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
        },
        "collectives": collective_totals(
            config, trainer.model, trainer.batch, trainer.data.vocab_size, trainer.ledger.links, process
        ),
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
    """Return the bytes of all experts as stored, and of their residuals in it; None: they are stored unquantized."""
    config, moe = trainer.config, trainer.config.moe
    if config.precision.residuals == "none":
        return None
    cluster = stored_sizes(config, moe.experts_per_cluster)
    clusters = config.moe_layers * moe.clusters
    return {"expert_bytes": clusters * cluster.nbytes, "residual_bytes": clusters * cluster.experts.nbytes}


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
