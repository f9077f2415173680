"""Lock of a run's folder, so that two jobs never write to one run."""

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from moe_dist.errors import ConfigError

LOCK = ".lock"
PATIENCE_SECONDS = 5.0
"""Time to wait for a lock, since that of a job that was just killed may be released late."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


class RunLock:
    """Exclusive lock of a run's folder, held until `release` or the end of the process.

    It is `flock` on a file in the folder. Linux implements it over NFS by locks of the server, so that it holds between
    nodes; mounts with `nolock` or `local_lock` restrict it to one node. File systems without locks (Lustre without
    `-o flock`) are reported by a warning.
    """

    def __init__(self, run: Path, patience: float | None = None) -> None:
        """Acquire the lock.

        Args:
            patience: seconds to wait for it; None: `PATIENCE_SECONDS`.

        Raises:
            ConfigError: another job holds it, or the folder cannot be written.
        """
        self._path = run / LOCK
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"{run}: cannot be locked for this job: {error.strerror}") from error
        deadline = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
        while not self._acquired(run):
            if time.monotonic() >= deadline:
                owner = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
                self.release()
                raise ConfigError(
                    f"{run} is in use by another job (process {owner}), which would lose its checkpoints and metrics: "
                    "wait for its end, or give this job another name or checkpoint.resume=none"
                )
            time.sleep(0.05)

    def _acquired(self, run: Path) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EACCES:  # Linux's answer over NFS while another client has the lock
                return False
            if error.errno not in _NO_LOCKS:
                self.release()
                raise ConfigError(f"{run}: cannot be locked for this job: {error.strerror}") from error
            logger.warning(
                "%s: this file system has no locks (%s): a second job of this name would not be noticed",
                run,
                error.strerror,
            )
            return True
        with suppress(OSError):  # a full disk: only the refusal of a second job lacks the owner
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return True

    def in_place(self) -> bool:
        """Return True if the locked file is still the one in the folder."""
        if self._descriptor < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
