"""New folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.errors import CheckpointError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block ends without an error, else vanishes.

    Raises:
        CheckpointError: `target` exists, or the folder cannot be made or written.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already: give another name, or remove it")
    partial = partial_name(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(target: Path) -> Path:
    """Return the name that `new_folder` gives a folder until it is whole."""
    return target.with_name(f".{target.name}.partial")


def require_space(folder: Path, size: int) -> None:
    """Check that a file system has room for some bytes.

    Raises:
        CheckpointError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CheckpointError(f"{folder} has no space for {size:,} bytes: {free:,} are free")
