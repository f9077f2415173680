"""A folder that one process owns while it runs: what other runs keep there is refused, what dead ones left removed."""

import fcntl
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from moe_dist.errors import OffloadError

LOCK = "lock"
FILES = "layer-*.bin"
"""What is kept here, and removed when it is found."""
FOLDER = "rank-{:05}"


class OwnedFolder:
    """Creates, locks and empties a folder; the lock ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OffloadError: another process owns it, or it cannot be made.
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
        """A descriptor of an empty file of that name, to be read and written."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self.path / name, flags, 0o600)
        except OSError as error:
            raise OffloadError(f"{self.path / name} cannot be made: {error.strerror}") from error

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the folder, and removes it if nothing else is in it."""
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
    """Where a rank keeps its files below the directory of a run."""
    return directory / FOLDER.format(rank)


def remove_other_ranks(directory: Path, ranks: int) -> None:
    """Removes what a dead run of more ranks than `ranks` left in those that this one lacks; owned folders stay."""
    for path in directory.glob("rank-*"):
        number = re.fullmatch(r"rank-(\d{5,})", path.name)
        if number is not None and int(number[1]) >= ranks:
            with suppress(OffloadError, OSError):  # another rank removes it too
                OwnedFolder(path).close()
