"""Metadata of a checkpoint: two JSON files, parsed strictly because their origin is not trusted.

manifest.json   step, configuration, data, placement, small values, and size and SHA-256 of every other file
index.json      every tensor: dtype, shape, and the file of each run of its elements
"""

import hashlib
import json
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from moe_dist.errors import CheckpointError

MANIFEST = "manifest.json"
INDEX = "index.json"
WEIGHT = "weight"
"""Prefix of a parameter's values (`weight/<name>`); its Adam moments have prefixes of their own."""
FileName = Annotated[str, Field(pattern=r"^(index\.json|rank-[0-9]{5}(-[0-9]{3,})?\.safetensors)$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NonNegative = Annotated[int, Field(ge=0)]
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class Record(BaseModel):
    """Base of the records in these files; unknown keys and wrong types are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


class FileRecord(Record):
    """Size in bytes and checksum of a file."""

    bytes: NonNegative
    sha256: Sha256


class PlacementRecord(Record):
    """`ExpertPlacement` of one layer."""

    members: list[list[int]]
    block_of_cluster: list[int]
    blocks: Annotated[int, Field(ge=1)]
    shards: Annotated[int, Field(ge=1)]
    version: NonNegative


class DataRecord(Record):
    """Identity of the training tokens, and the number of steps that have been taken from them."""

    train_checksum: int
    validation_checksum: int
    vocab_size: Annotated[int, Field(ge=1)]
    next_step: NonNegative
    """Position in the data, from 0. The loader is a pure function of (seed, step)."""
    order: NonNegative = 0
    """Version of that function; 0: sequences shuffled by NumPy's permutation."""


class Manifest(Record):
    """Metadata of a checkpoint; `files` is filled in when all files are written."""

    format: Literal[1] = 1
    kind: Literal["training", "weights"]
    step: NonNegative
    updates: NonNegative = 0
    """Number of optimizer updates, for Adam's bias correction."""
    ranks: Annotated[int, Field(ge=1)]
    config: dict[str, JsonValue]
    data: DataRecord
    placements: list[PlacementRecord] = []
    """Expert placement of each layer; empty unless experts are clustered."""
    values: dict[str, dict[str, JsonValue]] = {}
    versions: dict[str, str | None] = {}
    written: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    files: dict[FileName, FileRecord] = {}


class TensorRecord(Record):
    """One tensor; `chunks` holds (first element, number of elements, file) and covers it completely."""

    dtype: Literal[tuple(DTYPES)]  # type: ignore[valid-type]
    shape: list[NonNegative]
    chunks: list[tuple[NonNegative, NonNegative, FileName]]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch.dtype."""
        return DTYPES[self.dtype]


class Index(Record):
    """Every tensor of the checkpoint by its name."""

    tensors: dict[str, TensorRecord]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with a checksum of itself."""
    content = manifest.model_dump(mode="json")
    text = json.dumps({"checksum": _checksum(content), **content}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    content = _read_json(folder / MANIFEST)
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise CheckpointError(f"checkpoint {folder} is damaged: the checksum of {MANIFEST} is wrong")
    return _parse(Manifest, content, folder / MANIFEST)


def read_index(folder: Path) -> Index:
    """Read the index of a checkpoint; raises as `read_manifest` does."""
    return _parse(Index, _read_json(folder / INDEX), folder / INDEX)


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {path.name} is not JSON") from error


def _parse(record: type[AnyRecord], content: Any, path: Path) -> AnyRecord:
    try:
        return record.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "content"
        reason = " ".join(first["msg"].split())
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {path.name}: {key}: {reason}") from error
