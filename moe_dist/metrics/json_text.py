"""Strict JSON, in files that are written atomically."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_dist.errors import MoeDistError


def strict_json(value: Any, indent: int | None = None) -> str:
    """Encode as JSON with null for NaN and infinity; numpy and torch scalars become plain numbers."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader finds the old text or the new one, never a part.

    Raises:
        MoeDistError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(strict_json(value, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise MoeDistError(f"{path}: cannot be written: {error.strerror}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
