"""Sharing of a cache folder by processes: a file lock, and files that appear whole.

The kernel releases a lock when its holder ends, also after a crash. On a shared file system without locks the work is
repeated, which is harmless: files are renamed to their names when complete, and their content depends only on their
names.
"""

import errno
import fcntl
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` (created if missing, never removed).

    Args:
        wait: wait while another process holds it; false: yield False at once then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            _warn_of_no_locks(path.parent, error.strerror)
        yield True  # closing the file releases the lock


@cache
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    logger.warning("%s: this file system has no locks (%s); work may be repeated", folder, reason)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; a file written there is renamed to `path` when the block ends without an error."""
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
    """Remove temporary files of crashed processes of this machine; the caller holds the folder's lock."""
    for leftover in folder.glob(f"{_own_prefix()}*.tmp"):
        leftover.unlink(missing_ok=True)


def _own_prefix() -> str:
    return f".{socket.gethostname()}."
