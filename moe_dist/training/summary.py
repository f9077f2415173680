"""Description of a run at its start, and its summary at the end."""

from typing import TYPE_CHECKING, Any

from moe_dist.metrics import installed_versions
from moe_dist.model.language_model import count_parameters
from moe_dist.training.summary_metrics import all_to_all_totals, model_bytes, peak_memory

if TYPE_CHECKING:
    from moe_dist.training.trainer import Trainer


def description(trainer: "Trainer") -> str:
    """Return one line about model, ranks, precision and data."""
    config, moe = trainer.config, trainer.config.moe
    warmup = f", after {config.standard_steps} steps of standard experts" if config.standard_steps else ""
    return (
        f"{config.name}: {config.model.layers} layers of {config.model.hidden_size}, "
        f"{moe.layer_kind.describe(moe)}{warmup}; "
        f"{trainer.process.ranks} rank(s): {trainer.shape}; ZeRO {config.world.zero_stage}, {config.train.precision}, "
        f"{len(trainer.data.train):,} tokens of {config.corpus.kind} text, {trainer.data.vocab_size} pieces"
    )


def run_summary(trainer: "Trainer") -> dict[str, Any]:
    """Return the figures of `summary.json` (docs/metrics.md); collective."""
    config, process = trainer.config, trainer.process
    counts, peaks = count_parameters(trainer.model), peak_memory(process)
    whole, offloadable = model_bytes(trainer.engine)
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:
        found |= callback.summary()
    found["validation"] = {**found["validation"], "loss_stored": _loss_as_stored(trainer)}
    return {
        "name": config.name,
        "kind": config.moe.kind,
        **found,
        "parameters": vars(counts),
        "all_to_all": all_to_all_totals(trainer.ledger, found["tokens"], config.model.layers, process),
        "memory": {
            "peak_rss_bytes": max(peaks.rss_by_rank),
            "peak_rss_bytes_by_rank": peaks.rss_by_rank,
            "peak_device_bytes": peaks.device,
            "model_bytes": whole,
            "offloadable_bytes": offloadable,
            "offload": None if trainer.memory is None else trainer.memory.tiers.totals(process.device),
        },
        "world": vars(trainer.shape),
        "seed": config.seed,
        "versions": installed_versions(),
    }


def _loss_as_stored(trainer: "Trainer") -> float | None:
    """Return the validation loss with experts quantized as they are stored; None: they are stored unquantized."""
    if trainer.config.precision.residuals == "none":
        return None
    with trainer.model.with_quantized_experts():
        return trainer.validation_loss()
