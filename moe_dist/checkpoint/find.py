"""Choice of the checkpoint to resume from: all ranks verify its files together and agree on it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from moe_dist.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from moe_dist.checkpoint.store import FINAL, check, checkpoints_of, step_of
from moe_dist.errors import CheckpointError

Value = TypeVar("Value")


@dataclass(frozen=True)
class ValidCheckpoint:
    """A checkpoint whose files have all been verified, and the problems of newer ones."""

    path: Path
    manifest: Manifest
    damaged: dict[Path, str] = field(default_factory=dict)


def latest_valid_checkpoint(run: Path, *, weights: bool = False) -> ValidCheckpoint | None:
    """Return the newest undamaged checkpoint of a run, or None if the run has no checkpoint. Collective.

    Args:
        weights: accept the final weights, and prefer them.

    Raises:
        CheckpointError: every checkpoint is damaged.
    """
    damaged: dict[Path, str] = {}
    for candidate in agreed(_candidates(run, weights)):
        problem = first_problem(candidate)
        if problem is None:
            return ValidCheckpoint(candidate, read_manifest(candidate), damaged)
        damaged[candidate] = problem
    if damaged:
        raise CheckpointError(f"{run}: every checkpoint is damaged; the newest: {next(iter(damaged.values()))}")
    return None


def checked(checkpoint: Path) -> ValidCheckpoint:
    """Verify this checkpoint and no other; collective.

    Raises:
        CheckpointError: it is damaged or not a checkpoint.
    """
    problem = first_problem(checkpoint)
    if problem is not None:
        raise CheckpointError(problem)
    return ValidCheckpoint(checkpoint, read_manifest(checkpoint))


def is_checkpoint(path: Path) -> bool:
    """Return True if the path is one checkpoint rather than a run."""
    return (path / MANIFEST).exists()


def first_problem(checkpoint: Path) -> str | None:
    """Return the first problem of a checkpoint's files, or None; each rank verifies its share. Collective."""
    alone = not dist.is_initialized()
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    problem = None
    try:
        check(checkpoint, rank, ranks)
    except CheckpointError as error:
        problem = str(error)
    problems: list[str | None] = [problem] * ranks
    if not alone:
        dist.all_gather_object(problems, problem)
    return next((problem for problem in problems if problem), None)


def _candidates(run: Path, weights: bool) -> list[Path]:
    """Return the candidate folders, latest step first; final weights precede a checkpoint of the same step."""
    found = [(step_of(path), 0, path) for path in checkpoints_of(run)]
    final = run / FINAL
    if weights and is_checkpoint(final):
        try:
            found.append((read_manifest(final).step, 1, final))
        except CheckpointError:
            found.append((0, 1, final))  # damaged: reported if nothing else is valid
    return [path for _, _, path in sorted(found, reverse=True)]


def agreed(value: Value) -> Value:
    """Broadcast rank 0's value, because a shared file system may show a new folder to other ranks later."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
