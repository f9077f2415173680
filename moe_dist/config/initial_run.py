"""Run whose weights a new run starts from (`checkpoint.init`), as far as the new configuration takes after it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_dist.config.yaml_text import parse_yaml
from moe_dist.errors import ConfigError

CONFIG, MANIFEST, TOKENIZER_MODEL, TOKENIZER_JSON = "config.yaml", "manifest.json", "tokenizer.model", "tokenizer.json"
"""Files of a run's folder, and of a checkpoint's."""


def run_of_weights(path: Path) -> Path | None:
    """Return the run's folder for a run, `RUN/final` or `RUN/checkpoints/step-N`; None: it has no configuration."""
    places = (path, *(path.absolute().parents[:2] if (path / MANIFEST).is_file() else ()))
    return next((place for place in places if (place / CONFIG).is_file()), None)


def initial_settings(init: str) -> Mapping[str, Any]:
    """Return the configuration that a run was trained with, with the tokenizer that it holds; empty if unknown.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    path = Path(os.path.expanduser(init))
    run = run_of_weights(path)
    if run is None:
        return {}
    try:
        settings = parse_yaml((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"checkpoint.init={path}: {run / CONFIG} cannot be read: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("tokenizer", {}), dict):
        raise ConfigError(f"checkpoint.init={path}: {run / CONFIG} is not the configuration of a run")
    kept = next((name for name in (TOKENIZER_MODEL, TOKENIZER_JSON) if (run / name).is_file()), None)
    tokenizer = {**settings.get("tokenizer", {}), "path": str(run.absolute())} if kept else {}
    return {**settings, "tokenizer": tokenizer}


def with_initial_tokenizer(tree: Mapping[str, Any], chosen: bool) -> Mapping[str, Any]:
    """Return settings with the tokenizer of `checkpoint.init`, which the embedding belongs to.

    Args:
        chosen: the user's overrides hold keys of the tokenizer, which then stay.
    """
    checkpoint, tokenizer = tree.get("checkpoint"), tree.get("tokenizer") or {}
    init = checkpoint.get("init") if isinstance(checkpoint, dict) else None
    if chosen or not isinstance(init, str) or not isinstance(tokenizer, dict) or tokenizer.get("path") is not None:
        return tree
    theirs = initial_settings(init).get("tokenizer")
    return {**tree, "tokenizer": theirs} if theirs else tree
