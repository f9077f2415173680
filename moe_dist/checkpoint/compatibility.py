"""Compatibility of a configuration with a checkpoint: keys that must be equal, and keys that may differ."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moe_dist.checkpoint.manifest import DataRecord, Manifest
from moe_dist.config import RunConfig
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.metrics import flatten

MUST_MATCH = (
    "seed",
    "model",
    "moe",
    "tokenizer",
    "train.global_batch_size",
    "corpus.document_mask",
    "corpus.packing",
    "optimizer.kind",
    "optimizer.trainable",
)
"""Sections and keys that decide which tensors exist, what the model computes, and which tokens come next."""
FREE = (
    "model.activation_checkpointing", "model.init_std", "model.attention", "moe.backend", "moe.wire_dtype",
    "moe.overlap_chunks", "moe.balance_rate", "moe.aux_loss_weight", "moe.z_loss_weight", "moe.capacity_factor",
    "moe.shared_init", "tokenizer.train_bytes", "tokenizer.path",
)  # fmt: skip
"""Keys below `MUST_MATCH` that may differ: they choose an implementation, or steer training."""
UNREPORTED = (
    "name",
    "runs_dir",
    "summary_copy",
    "tensorboard",
    "wandb",
    "mlflow",
    "memory",
    "checkpoint",
    "watchdog",
    "corpus",
)
"""Keys that may differ and are not reported: where the run is stored, and where its text is (its tokens are compared).
"""

REPORTED = ("corpus.schedule",)
"""Keys below `UNREPORTED` that are reported nevertheless."""


def changed_keys(manifest: Manifest, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose value in the checkpoint's configuration differs from the present one, as (then, now)."""
    then = dict(flatten(config_of(manifest).model_dump(mode="json")))
    now = dict(flatten(config.model_dump(mode="json")))
    return {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}


def config_of(manifest: Manifest) -> RunConfig:
    """Return the configuration that a checkpoint was written under; keys newer than it have their defaults.

    Raises:
        CheckpointError: the configuration is invalid in this version.
    """
    try:
        return RunConfig.model_validate(manifest.config)
    except (ValidationError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint's configuration is invalid in this version: {reason}") from error


def check_config_compatible(manifest: Manifest, config: RunConfig, data: DataRecord) -> list[str]:
    """Reject a configuration that cannot resume from the checkpoint; return other differences as `key: then -> now`.

    Raises:
        CheckpointError: keys differ that must be equal (all are named), or the tokens differ.
    """
    changed = check_same_model(manifest, config)
    _require_same_tokens(manifest.data, data, changed)
    told = {key: pair for key, pair in changed.items() if key in REPORTED or not _is_below(key, UNREPORTED)}
    return [_shown({key: pair}) for key, pair in told.items()]


def check_same_model(manifest: Manifest, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Reject a configuration of another model, whatever its tokens; return all keys that differ."""
    changed = changed_keys(manifest, config)
    refused = {key: pair for key, pair in changed.items() if _is_below(key, MUST_MATCH) and not _is_below(key, FREE)}
    if refused:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} does not fit the configuration: {_shown(refused)}; set them back, "
            "or start a new run with checkpoint.resume=none"
        )
    return changed


def _require_same_tokens(then: DataRecord, now: DataRecord, changed: Mapping[str, tuple[Any, Any]]) -> None:
    if then.order != now.order:
        raise CheckpointError(
            "the checkpoint's run read its sequences in another order, that of an earlier version: start a new "
            "run from its weights with checkpoint.init"
        )
    if (then.train_checksum, then.vocab_size) == (now.train_checksum, now.vocab_size):
        return
    keys = {key: pair for key, pair in changed.items() if _is_below(key, ("corpus",)) and key != "corpus.cache_dir"}
    why = _shown(keys) if keys else "the same keys, so the text itself has changed"
    raise CheckpointError(
        f"the checkpoint's training tokens differ from those of corpus.*: {why}; to train its weights on other text, "
        "start a new run with checkpoint.init in place of checkpoint.resume"
    )


def _is_below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _shown(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: {then!r} -> {now!r}" for key, (then, now) in sorted(pairs.items()))
