"""Reader of a Hugging Face checkpoint's folder: config.json, and the tensors of its safetensors files one by one."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.errors import CheckpointError
from moe_dist.integrations.huggingface.transformers_library import require_transformers

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SourceFolder:
    """Open checkpoint; each tensor is read when it is asked for.

    Attributes:
        hf: content of config.json, with the defaults of its class.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf = read_config(folder)
        self._file_of = _files_of_tensors(folder)
        self._opened: dict[str, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Check that all these tensors are there with their shapes, and return their elements.

        Raises:
            CheckpointError: names the file and the first tensor that is missing or has another shape.
        """
        elements = 0
        for name, shape in shapes.items():
            found = self.shape(name)
            if found != shape:
                where = self.folder / self._file_of[name]
                raise CheckpointError(f"{where}: {name} has shape {found}, {CONFIG} needs {shape}")
            elements += prod(shape)
        return elements

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self._holder(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: it is missing, or its file cannot be read.
        """
        found: Tensor = self._holder(name).get_tensor(name)
        return found

    def _holder(self, name: str) -> Any:
        """Return the open file that holds a tensor."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}, which {CONFIG} needs")
        file = self._file_of[name]
        path = self.folder / file
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(path, "pt")
            if name not in self._opened[file].keys():  # noqa: SIM118 (no dict)
                raise CheckpointError(f"{path} has no tensor {name}, though {INDEX} has it there")
            return self._opened[file]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json, with the defaults of its class.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    transformers = require_transformers()
    model_type = raw.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        return raw
    try:
        config = transformers.CONFIG_MAPPING[model_type](**raw)
    except Exception as error:  # the validation of each class raises errors of its own
        raise CheckpointError(f"{folder / CONFIG} is invalid: {' '.join(str(error).split())[:300]}") from error
    content = config.to_dict()
    aliases = {alias: content.get(key) for alias, key in config.attribute_map.items()}
    return {**aliases, **content, "architectures": raw.get("architectures")}


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, of the index or of the one file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}: give a folder of safetensors files")
        try:
            with safe_open(folder / WEIGHTS, "pt") as file:
                return dict.fromkeys(file.keys(), WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {' '.join(str(error).split())[:200]}") from error
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: it maps no tensors to files") from error
    missing = sorted(file for file in set(files.values()) if not (folder / file).is_file() or "/" in file)
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} of {INDEX} is missing")
    return files
