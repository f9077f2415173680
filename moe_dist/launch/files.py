"""Checks of files that the user named, before imports that take seconds."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from moe_dist.errors import LaunchError


def writable(file: Path, option: str = "--json") -> str:
    """Return the absolute path of a file that can be written as a whole: neither a folder, nor a device, nor a pipe.

    Raises:
        LaunchError: it cannot; names the option.
    """
    target = file.absolute()
    replaceable = target.is_file() or not target.exists()
    if not (replaceable and target.parent.is_dir() and os.access(target.parent, os.W_OK)):
        raise LaunchError(f"{option} {file}: cannot be written: give a file in a folder that exists")
    return str(target)


def new_folder_name(folder: Path, option: str = "--output") -> Path:
    """Return the absolute path of a folder whose name is free, and make its parents.

    Raises:
        LaunchError: the name is taken, or a parent cannot be made or written; names the option.
    """
    target = folder.absolute()
    if target.exists():
        raise LaunchError(f"{option} {folder}: exists already: give another name, or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{option} {folder}: {target.parent} cannot be made: {error.strerror}") from error
    if not os.access(target.parent, os.W_OK):
        raise LaunchError(f"{option} {folder}: {target.parent} cannot be written: give a folder of yours")
    return target


def with_summary(overrides: Sequence[str], file: str | None) -> list[str]:
    """Return the overrides, with one more that also writes the run's summary to a file."""
    return [*overrides] if file is None else [*overrides, f"summary_copy={json.dumps(file)}"]


def require_run(run: Path) -> None:
    """Check that the folder or file of a run exists.

    Raises:
        LaunchError: it does not.
    """
    if not run.exists():
        raise LaunchError(
            f"{run} does not exist: give the folder of a run that has ended or saved a checkpoint, such as runs/NAME"
        )
