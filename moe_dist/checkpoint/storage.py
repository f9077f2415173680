"""Storage for `torch.distributed.checkpoint`: one safetensors file per rank, no pickle.

A checkpoint is written under a temporary name. It takes its final name only after every rank has written its part,
every file is on the disk, and the manifest lists the files: a reader finds a complete checkpoint or none.
"""

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe_dist.checkpoint.file_groups import grouped_by_bytes
from moe_dist.checkpoint.manifest import (
    INDEX,
    FileRecord,
    Index,
    Manifest,
    TensorRecord,
    write_manifest,
)
from moe_dist.checkpoint.sharded_tensor import OffloadedShard, State
from moe_dist.errors import CheckpointError

PARTIAL = ".partial"
OFFLOADED_FILE_BYTES = 64 << 20
"""Target size of one file of offloaded tensors, and so of the memory that writing them takes, bytes."""


def partial_name(target: Path) -> Path:
    """Return the temporary name of a checkpoint that is not complete."""
    return target.with_name(f".{target.name}{PARTIAL}")


class ShardWriter(StorageWriter):
    """Writer of one checkpoint to the folder `target`; `finish` commits it.

    Args:
        state: tensors that this rank writes; their shapes go into the index, since torch handles them flattened.
    """

    def __init__(self, target: Path, manifest: Manifest, state: State, rank: int) -> None:
        self._target, self._folder, self._manifest, self._rank = target, partial_name(target), manifest, rank
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        self._offloaded_bytes = {
            (name, shard.start): shard.length * shard.dtype.itemsize
            for name, tensor in state.items()
            for shard in tensor.shards
            if isinstance(shard, OffloadedShard)
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer is used once."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any id: the constructor sets the folder."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create an empty folder under the temporary name, on the coordinator; remove leftovers of a failed attempt."""
        if is_coordinator:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Attach the shapes of this rank's tensors to its plan, for the coordinator."""
        return SavePlan(plan.items, storage_data=self._shapes)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Collect the shapes of all ranks' tensors for the index, and detach them from the plans."""
        for plan in plans:
            self._shapes.update(plan.storage_data)
        return [SavePlan(plan.items) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files before returning; each result holds name, size and checksum of its file.

        Raises:
            CheckpointError: this rank does not see the folder that rank 0 created.
        """
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        if not self._folder.is_dir():
            raise CheckpointError(
                f"rank {self._rank} does not see {self._folder}, which rank 0 created: runs_dir must be on a file "
                "system that all nodes share"
            )
        results = []
        for number, items in enumerate(self._by_file(plan.items)):
            suffix = f"-{number:03}" if number else ""
            results += self._write_file(self._folder / f"rank-{self._rank:05}{suffix}.safetensors", items, planner)
        return results

    def _by_file(self, items: Sequence[WriteItem]) -> list[list[WriteItem]]:
        """Group tensors in memory into one file, and offloaded ones into files small enough to buffer one by one."""
        in_order = sorted(items, key=lambda item: self._offloaded_bytes_of(item) > 0)  # stable: in that of clusters
        return grouped_by_bytes(in_order, self._offloaded_bytes_of, OFFLOADED_FILE_BYTES)

    def _offloaded_bytes_of(self, item: WriteItem) -> int:
        assert item.index.offset is not None
        return self._offloaded_bytes.get((item.index.fqn, item.index.offset[0]), 0)

    def _write_file(self, path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        tensors = {}
        for item in items:
            values = planner.resolve_data(item)
            assert isinstance(values, torch.Tensor)
            tensors[key_of(item.index)] = values
        save_file(tensors, path)
        path.chmod(self._folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
        written = (path.name, recorded(path))
        return [WriteResult(item.index, tensors[key_of(item.index)].nbytes, written) for item in items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write index and manifest, then rename the folder to its final name; on the coordinator, after all writes.

        Raises:
            CheckpointError: some elements of a tensor are on no rank.
        """
        files: dict[str, FileRecord] = dict(result.storage_data for rank in results for result in rank)
        where = {result.index: result.storage_data[0] for rank in results for result in rank}
        index = Index(tensors={name: self._record(name, metadata, where) for name in metadata.state_dict_metadata})
        (self._folder / INDEX).write_text(index.model_dump_json(), encoding="utf-8")
        files[INDEX] = recorded(self._folder / INDEX)
        write_manifest(self._folder, self._manifest.model_copy(update={"files": files}))
        sync(self._folder / "manifest.json")
        sync(self._folder)
        _take_name(self._folder, self._target)

    def _record(self, name: str, metadata: Metadata, where: dict[MetadataIndex, str]) -> TensorRecord:
        stored = metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        chunks = [
            (chunk.offsets[0], chunk.sizes[0], where[MetadataIndex(name, chunk.offsets)]) for chunk in stored.chunks
        ]
        record = TensorRecord(dtype=dtype, shape=list(self._shapes[name]), chunks=chunks)
        if sum(length for _, length, _ in chunks) != record.numel:
            raise CheckpointError(f"{name} of shape {record.shape} is incomplete: some of its elements are on no rank")
        return record


class ShardReader(StorageReader):
    """Reader of the checkpoint in `folder`, whose index and files have been verified."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader has no state."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any id: the constructor sets the folder."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index as torch's metadata, every tensor flattened."""
        return Metadata({name: _flat(tensor) for name, tensor in self._index.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: reading needs no preparation."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged: the index already names the file of each chunk."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged: ranks read independently."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the elements that this rank needs, file by file, before returning.

        Raises:
            CheckpointError: a file is damaged.
        """
        by_file: defaultdict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._file_of(item.storage_index)].append(item)
        for name, items in sorted(by_file.items()):
            self._read(self._folder / name, items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _file_of(self, index: MetadataIndex) -> str:
        assert index.offset is not None
        return next(file for start, _, file in self._index.tensors[index.fqn].chunks if start == index.offset[0])

    def _read(self, path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for item in items:
                    start, length = item.storage_offsets[0], item.lengths[0]
                    values = file.get_slice(key_of(item.storage_index))[start : start + length]
                    target = planner.resolve_tensor(item)
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self._folder} is damaged: {path.name}: {error}") from error


def key_of(index: MetadataIndex) -> str:
    """Return a shard's name in its file."""
    assert index.offset is not None
    return f"{index.fqn}@{index.offset[0]}"


def recorded(path: Path) -> FileRecord:
    """Flush a file to the disk and return its size and checksum."""
    sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_name(folder: Path, target: Path) -> None:
    """Rename the folder to `target`; an earlier attempt of that name is moved away first, then deleted."""
    old = target.with_name(f".{target.name}.old{PARTIAL}")
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if replaced:
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flat(tensor: TensorRecord) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size([start]), torch.Size([length])) for start, length, _ in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.torch_dtype), torch.Size([tensor.numel]), chunks)
