"""Reader of exported files: metadata, and tensors one at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.checkpoint.manifest import Manifest
from moe_dist.errors import CheckpointError


class ExportedFile:
    """An open exported file; create it with `open_exported`."""

    def __init__(self, path: Path, opened: Any) -> None:
        self._path, self._opened = path, opened
        self._names = frozenset(opened.keys())

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return self._names

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: the file has no tensor of that name.
        """
        if name not in self._names:
            raise CheckpointError(f"{self._path} has no tensor {name}")
        found: Tensor = self._opened.get_tensor(name)
        return found

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor of a known shape.

        Raises:
            CheckpointError: the tensor is missing or has another shape.
        """
        value = self.tensor(name)
        if value.shape != shape:
            raise CheckpointError(f"{self._path}: {name} has shape {tuple(value.shape)}, the model needs {shape}")
        return value

    def manifest(self) -> Manifest:
        """Return configuration, step and placements in the form of a checkpoint's manifest.

        Raises:
            CheckpointError: `moe-dist export` did not write the file.
        """
        metadata = self._metadata()
        try:
            parts = {key: json.loads(metadata[key]) for key in ("step", "config", "placements", "data")}
            return Manifest.model_validate_json(json.dumps({"kind": "weights", "ranks": 1, **parts}))
        except (KeyError, ValueError, RecursionError, ValidationError) as error:
            raise CheckpointError(
                f"{self._path} is not a file that moe-dist export wrote ({_line(error)}): give one, or the folder of a "
                "run or a checkpoint"
            ) from error

    @property
    def stored(self) -> bool:
        """True if clusters are quantized in the file."""
        return self._metadata().get("stored") == "true"

    def _metadata(self) -> dict[str, str]:
        return self._opened.metadata() or {}


@contextmanager
def open_exported(path: Path) -> Iterator[ExportedFile]:
    """Open a file that `moe-dist export` wrote.

    Raises:
        CheckpointError: it cannot be read, or is not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as opened:
            yield ExportedFile(path, opened)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of moe-dist export ({_line(error)}): give one, or the folder of a run or "
            "a checkpoint"
        ) from error


def _line(error: Exception) -> str:
    missing = f"no {error.args[0]} in its metadata" if isinstance(error, KeyError) else str(error)
    return " ".join(missing.split())[:300]
