"""Checkpoints of one run (`runs/<name>/checkpoints/step-00000500/`): listing, verification, retention."""

import hashlib
import re
import shutil
from contextlib import suppress
from pathlib import Path

from moe_dist.checkpoint.manifest import Manifest, read_index, read_manifest
from moe_dist.checkpoint.storage import PARTIAL, partial_name
from moe_dist.config import CheckpointConfig
from moe_dist.errors import CheckpointError

CHECKPOINTS = "checkpoints"
FINAL = "final"
_STEP = re.compile(r"step-([0-9]{8,})")


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` updates."""
    return run / CHECKPOINTS / f"step-{step:08}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def checkpoints_of(run: Path) -> list[Path]:
    """Return a run's committed checkpoints, newest first; they have not been verified."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=step_of, reverse=True)


def check(checkpoint: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Read a checkpoint's manifest and index, and verify checksums of every `parts`-th file, from `part` on.

    Raises:
        CheckpointError: a file is missing or damaged, or differs from the manifest.
    """
    manifest = read_manifest(checkpoint)
    for number, (name, record) in enumerate(sorted(manifest.files.items())):
        try:
            with (checkpoint / name).open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                if size != record.bytes:
                    raise CheckpointError(
                        f"checkpoint {checkpoint} is damaged: {name} has {size} bytes instead of {record.bytes}"
                    )
                if number % parts == part and hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                    raise CheckpointError(f"checkpoint {checkpoint} is damaged: the checksum of {name} is wrong")
        except OSError as error:
            raise CheckpointError(f"checkpoint {checkpoint}: {name} cannot be read: {error.strerror}") from error
    _require_consistent(checkpoint, manifest)
    return manifest


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither used nor counted, and return its new name."""
    number, target = 1, checkpoint.with_name(f"damaged-{checkpoint.name}")
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    return checkpoint.rename(target)


def remove_partial(run: Path) -> None:
    """Remove incomplete checkpoints of an earlier process of this run, as far as that is possible."""
    with suppress(OSError):
        for leftover in [*(run / CHECKPOINTS).glob(f".*{PARTIAL}"), *run.glob(f".{FINAL}*{PARTIAL}")]:
            shutil.rmtree(leftover, ignore_errors=True)


def prune(run: Path, options: CheckpointConfig) -> list[Path]:
    """Delete the checkpoints beyond the retention limits, oldest first, and return them.

    The newest `keep_last` complete checkpoints are kept, and every one whose step `keep_every` divides. One that lacks
    a file does not count, so that the last valid checkpoint is never deleted.
    """
    complete = [path for path in checkpoints_of(run) if _is_complete(path)]
    kept = options.keep_every
    doomed = [path for path in complete[options.keep_last :] if not kept or step_of(path) % kept]
    for path in reversed(doomed):
        shutil.rmtree(path.rename(partial_name(path)))  # a crash in between leaves a temporary folder, not a checkpoint
    return doomed


def _is_complete(checkpoint: Path) -> bool:
    """Return True if every file has its recorded size, without reading them."""
    try:
        manifest = read_manifest(checkpoint)
        return all((checkpoint / name).stat().st_size == record.bytes for name, record in manifest.files.items())
    except (CheckpointError, OSError):
        return False


def _require_consistent(checkpoint: Path, manifest: Manifest) -> None:
    """Reject an index that names unlisted files, incomplete tensors, or more data than the files hold."""
    size = 0
    for name, tensor in read_index(checkpoint).tensors.items():
        if any(file not in manifest.files for _, _, file in tensor.chunks):
            raise CheckpointError(f"checkpoint {checkpoint} is damaged: index.json: {name} is in a file not listed")
        if sum(length for _, length, _ in tensor.chunks) != tensor.numel:
            raise CheckpointError(f"checkpoint {checkpoint} is damaged: index.json: {name} is incomplete")
        size += tensor.numel * tensor.torch_dtype.itemsize
    if size > sum(record.bytes for record in manifest.files.values()):
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: index.json lists more data than its files hold")
