"""File that only grows, and loses nothing while it cannot be written."""

import os
import threading
from contextlib import suppress
from pathlib import Path

PENDING_BYTES = 64 << 20
"""Limit of the records kept in memory, bytes; later ones are dropped."""


class AppendFile:
    """Writer of whole records; those that cannot be written stay in memory, and are written before the next one.

    Attributes:
        header: first record of the file, written again if the file was removed.
        dropped: records lost because memory held too many.
    """

    def __init__(self, path: Path, header: bytes = b"") -> None:
        self.path, self.header, self.dropped = path, header, 0
        self._descriptor, self._pending = -1, bytearray()
        self._lock = threading.Lock()  # a watchdog's thread records its event too

    @property
    def pending(self) -> int:
        """Size in bytes of the records that are not written yet."""
        return len(self._pending)

    def append(self, record: bytes) -> None:
        """Write a record, after those that could not be written before.

        Raises:
            OSError: it cannot be written; it is kept in memory.
        """
        with self._lock:
            if len(self._pending) + len(record) <= PENDING_BYTES:
                self._pending += record
            else:
                self.dropped += 1
            if not self._in_place():
                self._open()
            while self._pending:
                del self._pending[: os.write(self._descriptor, self._pending)]

    def close(self) -> None:
        """Close the file; may be called twice."""
        with self._lock:
            self._forget()

    def _in_place(self) -> bool:
        """Return True if the open file is still the one at `path`; a removed file can be written without an error."""
        if self._descriptor < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _open(self) -> None:
        self._forget()
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if self.header and not os.fstat(self._descriptor).st_size and not self._pending.startswith(self.header):
            self._pending[:0] = self.header

    def _forget(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):  # NFS reports errors of earlier writes here
                os.close(self._descriptor)
            self._descriptor = -1
