"""Folder that one process owns exclusively; leftovers of dead processes are removed."""

import fcntl
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from moe_dist.errors import OffloadError

LOCK = "lock"
FILES = "layer-*.bin"
"""Pattern of the files in an owned folder, which are removed when found."""
FOLDER = "rank-{:05}"


class OwnedFolder:
    """Locked, empty folder; the lock ends with the process."""

    def __init__(self, path: Path) -> None:
        """Create, lock and empty the folder.

        Raises:
            OffloadError: another process owns it, or it cannot be created.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OffloadError(f"memory.directory: {path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._lock, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise OffloadError(
                f"memory.directory: {path} is used by another run (process {owner}): give this one a directory of "
                "its own"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._remove_leftovers()

    def open(self, name: str) -> int:
        """Create an empty file of that name and return its descriptor, open for reading and writing."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self.path / name, flags, 0o600)
        except OSError as error:
            raise OffloadError(f"{self.path / name} cannot be created: {error.strerror}") from error

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the folder, and remove it if it is empty."""
        if self._lock < 0:
            return
        self.remove(LOCK)
        os.close(self._lock)
        self._lock = -1
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _remove_leftovers(self) -> None:
        try:
            for path in self.path.glob(FILES):
                path.unlink()
        except OSError as error:
            os.close(self._lock)
            raise OffloadError(f"memory.directory: {error.filename} cannot be removed: {error.strerror}") from error


def folder_of(directory: Path, rank: int) -> Path:
    """Return the folder of a rank below a run's directory."""
    return directory / FOLDER.format(rank)


def remove_other_ranks(directory: Path, ranks: int) -> None:
    """Remove the leftovers of a dead run with more than `ranks` ranks; folders that are locked stay."""
    for path in directory.glob("rank-*"):
        number = re.fullmatch(r"rank-(\d{5,})", path.name)
        if number is not None and int(number[1]) >= ranks:
            with suppress(OffloadError, OSError):  # another rank removes it too
                OwnedFolder(path).close()
