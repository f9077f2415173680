"""What processes need to share a cache folder: one works while the others wait, and no file is seen half-written.

A lock is released by the kernel when its holder ends, however it ends, so a crash wedges nobody. On a shared file
system without locks the work is done more than once, which is harmless: every file is complete when it takes its name,
and its content depends only on what the name stands for.
"""

import errno
import fcntl
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path` (made if need be, never removed), waiting for as long as another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            logger.warning("%s: this file system has no locks (%s); work may be repeated", path, error.strerror)
        yield  # closing the file releases the lock


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there takes the name `path` at once, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_own_prefix()}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what crashed processes of this machine left half-written in `folder`; needs the folder's lock held."""
    for leftover in folder.glob(f"{_own_prefix()}*.tmp"):
        leftover.unlink(missing_ok=True)


def _own_prefix() -> str:
    return f".{socket.gethostname()}."
