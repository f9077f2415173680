"""Compressed layers of an import, one file each, until the run is written: processes share the work, and a killed
import goes on with the layers that it has.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.data.cache import atomic_write, exclusive
from moe_dist.integrations.huggingface.imported_tensors import LazyTensor, Tensors

logger = logging.getLogger(__name__)


class StoredLayer(NamedTuple):
    """Clustered layer: its parameters, the experts of each cluster, and the relative error of each expert's output."""

    tensors: Tensors
    members: Sequence[Sequence[int]]
    errors: Sequence[float]


class LayerStore:
    """Folder of compressed layers beside the run `target`.

    Args:
        identity: digest of everything that the layers depend on; layers of another one are made again.
        layers: number of layers that are to be compressed.
    """

    def __init__(self, target: Path, identity: str, layers: int) -> None:
        self._target, self._identity, self._layers = target, identity, layers
        self._folder = store_name(target)

    @contextmanager
    def claim(self, layer: int) -> Iterator[bool]:
        """Yield True if this process is to compress a layer: it is not stored, and no other process is at it."""
        with exclusive(self._path(layer, "lock"), wait=False) as free:
            yield free and self.read(layer) is None

    @property
    def finished(self) -> bool:
        """True once another process has written the run."""
        return self._target.exists()

    def missing(self) -> list[int]:
        """Return the layers that are not stored."""
        return [layer for layer in range(self._layers) if self.read(layer) is None]

    def wait(self, layer: int) -> None:
        """Wait until the process that compresses a layer has stored it, or was killed."""
        with exclusive(self._path(layer, "lock")):
            pass

    def write(
        self, layer: int, tensors: Mapping[str, Tensor], members: Sequence[Sequence[int]], errors: Sequence[float]
    ) -> None:
        """Store a layer; arguments as in `StoredLayer`."""
        metadata = {"identity": self._identity, "facts": json.dumps([members, errors])}
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with atomic_write(self._path(layer, "safetensors")) as path:
            save_file(copies, path, metadata)

    def read(self, layer: int) -> StoredLayer | None:
        """Return a layer, whose tensors are read when they are needed; None: it is missing, damaged, or of others."""
        path = self._path(layer, "safetensors")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                if metadata["identity"] != self._identity:
                    return None
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            members, errors = json.loads(metadata["facts"])
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("layer %d is compressed again: %s", layer, error)
            return None
        return StoredLayer(
            {name: LazyTensor(shape, partial(_tensor, path, name)) for name, shape in shapes.items()}, members, errors
        )

    def _path(self, layer: int, suffix: str) -> Path:
        return self._folder / f"{layer:04d}.{suffix}"


def store_name(target: Path) -> Path:
    """Return the folder of the compressed layers of an import."""
    return target.with_name(f".{target.name}.layers")


def remove_store(target: Path) -> None:
    """Remove the compressed layers of an import, if there are any."""
    shutil.rmtree(store_name(target), ignore_errors=True)


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        found: Tensor = file.get_tensor(name)
    return found
